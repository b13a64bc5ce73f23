"""The Python interface: what goes in, what comes out, and what is left as it was."""

import inspect
import random
import signal
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import opcd
from tests.conftest import CHATML, tiny_llama, tiny_tokenizer

CONTEXT = "Answer with one letter."
PROMPTS = [
    "red",
    "blue",
    "pink",
    "teal",
    "gold",
    "grey",
    "lime",
    "navy",
    "plum",
    "rust",
    "sand",
    "snow",
]
TEST = [{"prompt": word, "answer": word[0]} for word in ("cat", "dog", "owl", "ant")]
SHORT = {
    "steps": 3,
    "prompts_per_step": 4,
    "max_completion_tokens": 8,
    "learning_rate": 3e-3,
    "dtype": "float32",
    "device": "cpu",
}


class Rows:
    """Iterates over dicts, and is neither a list nor a mapping, like datasets.Dataset."""

    def __len__(self) -> int:
        return len(TEST)

    def __getitem__(self, key: object) -> object:
        return [row[key] for row in TEST] if isinstance(key, str) else TEST[key]

    def __iter__(self) -> object:
        return iter(TEST)


def test_the_public_names() -> None:
    """A change here is a change for users: see docs/python.md."""
    assert opcd.__all__ == sorted(
        [
            *("Distilled", "Evaluated", "InputError", "SharedPrefixTeacher", "Stopped"),
            *("StudentLoss", "TrainConfig", "__version__", "distill", "evaluate"),
        ]
    )
    assert list(inspect.signature(opcd.distill).parameters) == [
        *("model", "context", "prompts", "tokenizer", "validation_data", "test_data"),
        *("output_dir", "preset", "resume", "in_place", "on_step", "on_validation", "settings"),
    ]
    assert list(inspect.signature(opcd.evaluate).parameters) == [
        *("model", "context", "test_data", "distilled", "tokenizer", "output_dir", "preset"),
        "settings",
    ]
    for name in opcd.__all__:
        assert getattr(opcd, name).__doc__
    assert set(dir(opcd.Distilled)) >= {"model", "tokenizer", "scorecard", "metrics", "answers"}
    assert set(dir(opcd.Distilled)) >= {"report", "save"}


def test_a_loaded_model_in_a_thread_leaves_nothing_behind(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    generation = model.generation_config.to_dict()
    before = (torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(signal.SIGINT))
    torch.manual_seed(3)
    random.seed(3)
    expected = (torch.rand(2).tolist(), random.random())
    torch.manual_seed(3)
    random.seed(3)
    seen: list[int] = []
    result: list[opcd.Distilled] = []

    def handle() -> None:
        with torch.no_grad():  # as a server would
            result.append(
                opcd.distill(
                    model,
                    CONTEXT,
                    PROMPTS,
                    tokenizer=tiny_tokenizer(),
                    validation_data=[{"prompt": "apple", "answer": "a"}],
                    test_data=Rows(),
                    on_step=lambda metrics: seen.append(metrics["step"]),
                    on_validation=lambda metrics: seen.append(-metrics["step"]),
                    validate_every=2,
                    **SHORT,
                )
            )

    thread = threading.Thread(target=handle)
    thread.start()
    thread.join()
    (distilled,) = result
    assert (torch.rand(2).tolist(), random.random()) == expected
    assert before == (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        signal.getsignal(signal.SIGINT),
    )
    assert seen == [1, 2, -2, 3, -3]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.generation_config.to_dict() == generation
    assert any(not torch.equal(t, weights[n]) for n, t in distilled.model.state_dict().items())
    assert [row["step"] for row in distilled.metrics] == [1, 2, 3]
    assert distilled.scorecard["contenders"]["distilled"]["n"] == 4
    assert len(distilled.answers) == 4
    assert distilled.report().startswith("# ")
    assert distilled.tokenizer.chat_template == CHATML
    assert "distilled" in repr(distilled)
    saved = distilled.save(tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(saved)
    folder = distilled.folder
    assert folder.is_dir()
    result.clear()
    del distilled
    assert not folder.exists()


def test_python_and_the_command_line_train_the_same(
    settings: dict, model_dir: Path, tmp_path: Path
) -> None:
    from opcd.cli import main
    from tests.conftest import in_groups

    (tmp_path / "config.yaml").write_text(in_groups(settings))
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 0
    names = ("prompts", "validation_data", "test_data")
    paths = {name: Path(settings[name]) for name in names}
    rest = {k: v for k, v in settings.items() if k not in {*names, "model", "context"}}
    rest["output_dir"] = tmp_path / "second"
    distilled = opcd.distill(settings["model"], CONTEXT, paths.pop("prompts"), **paths, **rest)
    theirs = opcd.Distilled(Path(settings["output_dir"]))
    assert [m["loss"] for m in distilled.metrics] == [m["loss"] for m in theirs.metrics]
    assert distilled.scorecard["contenders"] == theirs.scorecard["contenders"]


def test_in_place(tmp_path: Path) -> None:
    model = tiny_llama()
    before = model.lm_head.weight.clone()
    distilled = opcd.distill(
        model, CONTEXT, PROMPTS, tokenizer=tiny_tokenizer(), in_place=True, **SHORT
    )
    assert distilled.model is model
    assert not torch.equal(model.lm_head.weight, before)
    assert distilled.scorecard is None
    assert distilled.report() == ""


def test_a_callback_ends_a_run_that_goes_on_later(tmp_path: Path) -> None:
    def run(**more: object) -> opcd.Distilled:
        return opcd.distill(
            tiny_llama(),
            [{"role": "system", "content": CONTEXT}],
            [[{"role": "user", "content": word}] for word in PROMPTS],
            tokenizer=tiny_tokenizer(),
            output_dir=tmp_path / "run",
            **SHORT,
            **more,
        )

    with pytest.raises(opcd.Stopped, match="stopped by enough after step 2") as stopped:
        run(on_step=lambda metrics: "enough" if metrics["step"] == 2 else None)
    assert stopped.value.folder == tmp_path / "run"
    assert [row["step"] for row in run(resume=True).metrics] == [1, 2, 3]


def test_ctrl_c_saves(tmp_path: Path) -> None:
    def interrupt(metrics: dict) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(opcd.Stopped, match="SIGINT after step"):
        opcd.distill(
            tiny_llama(),
            CONTEXT,
            PROMPTS,
            tokenizer=tiny_tokenizer(),
            output_dir=tmp_path / "run",
            on_step=interrupt,
            **SHORT,
        )
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_evaluate(model_dir: Path) -> None:
    found = opcd.evaluate(model_dir, CONTEXT, TEST, max_completion_tokens=4, dtype="float32")
    assert list(found.scorecard["contenders"]) == ["base", "prompted"]
    again = opcd.evaluate(
        model_dir, CONTEXT, TEST, distilled=model_dir, max_completion_tokens=4, dtype="float32"
    )
    columns = again.scorecard["contenders"]
    assert columns["distilled"]["accuracy"] == columns["base"]["accuracy"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"context": "context.md"},
            "the text itself, got 'context.md', which is a file; pass",
        ),
        ({"context": " "}, "context must not be blank"),
        ({"context": 3}, "context must be text, a list of messages or a pathlib.Path, got int"),
        ({"context": Path("none.md")}, "none.md', which is not there"),
        ({"prompts": "prompts.jsonl"}, "prompts must be a list of requests, or the pathlib.Path"),
        ({"prompts": [3]}, r"prompts\[0\] must be a string, messages or a dict, got int"),
        ({"prompts": []}, "must not be empty"),
        ({"model": 3}, "model must be a name, a folder or a transformers model, got int"),
        ({"tokenizer": None}, "a loaded model needs its tokenizer, got NoneType"),
        ({"learning_rte": 1}, "there is no field 'learning_rte'; did you mean learning_rate?"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"in_place": True, "model": "x", "tokenizer": None}, "in_place needs a loaded model"),
        ({"model": "x"}, "a tokenizer goes with a loaded model"),
        ({"test_data": [{"prompt": "a", "answer": {1}}]}, r"test_data\[0\] must hold what JSON"),
    ],
)
def test_what_is_refused(
    change: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("context.md").write_text(CONTEXT)
    given = {
        "model": tiny_llama(),
        "context": CONTEXT,
        "prompts": PROMPTS,
        "tokenizer": tiny_tokenizer(),
    }
    with pytest.raises(opcd.InputError, match=message):
        opcd.distill(**given | SHORT | change)
