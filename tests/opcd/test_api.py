"""The Python interface: what goes in, what comes out, and what is left as it was."""

import inspect
import json
import pickle
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import AutoModelForCausalLM
from transformers.utils.logging import is_progress_bar_enabled

import opcd
from tests.conftest import CHATML, tiny_llama, tiny_tokenizer
from tests.opcd.tasks.templates import TOOL_FAMILIES
from tests.opcd.tasks.test_tool_templates import RAIN, TOOL

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
    "elsewhere_prompts": 0,
}


class Rows:
    """Iterates over dicts, and is neither a list nor a mapping, like datasets.Dataset."""

    def __len__(self) -> int:
        return len(TEST)

    def __getitem__(self, key: object) -> object:
        return [row[key] for row in TEST] if isinstance(key, str) else TEST[key]

    def __iter__(self) -> object:
        return iter(TEST)


class Readable(list):
    """An open file is iterable, too."""

    def read(self) -> str:
        return ""


def test_the_public_names() -> None:
    """A change here is a change for users: see docs/python.md."""
    assert opcd.__all__ == sorted(
        [
            *("Checked", "Distilled", "Evaluated", "InputError", "Served", "SharedPrefixTeacher"),
            *("Stopped", "StudentLoss", "__version__", "check", "distill", "evaluate"),
            "serve_report",
        ]
    )
    assert list(inspect.signature(opcd.distill).parameters) == [
        *("model", "context", "prompts", "tokenizer", "validation_data", "test_data"),
        *(
            "elsewhere_data",
            "output_dir",
            "preset",
            "resume",
            "in_place",
            "on_step",
            "on_validation",
            "quiet",
        ),
        "settings",
    ]
    assert list(inspect.signature(opcd.evaluate).parameters) == [
        *(
            "model",
            "context",
            "test_data",
            "distilled",
            "elsewhere_data",
            "contenders",
            "served_model",
            "tokenizer",
        ),
        *("output_dir", "preset", "quiet", "settings"),
    ]
    assert list(inspect.signature(opcd.serve_report).parameters) == [
        *("run", "allow_code", "quiet", "wanted")
    ]
    for name in opcd.__all__:
        assert getattr(opcd, name).__doc__
    assert set(dir(opcd.Distilled)) >= {"model", "tokenizer", "scorecard", "metrics", "answers"}
    assert set(dir(opcd.Distilled)) >= {"report", "save"}


def test_a_look_before_any_training(capsys: pytest.CaptureFixture) -> None:
    model = tiny_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = found()
    looked = opcd.check(model, CONTEXT, PROMPTS, tokenizer=tiny_tokenizer(), **SHORT)
    assert before == found()
    assert looked.verdict.word in capsys.readouterr().out
    assert looked.found.measured is not None
    assert looked.found.measured.requests == len(PROMPTS)
    assert looked.found.measured.prompted is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_look_is_kept_where_a_run_will_be(tmp_path: Path) -> None:
    """All figures, but nothing where the data are refused."""
    run = tmp_path / "run"
    short = SHORT | {"output_dir": run, "tokenizer": tiny_tokenizer(), "quiet": True}
    with pytest.raises(opcd.InputError, match=r"blank"):
        opcd.check(tiny_llama(), CONTEXT, [*PROMPTS, " "], **short)
    assert not [*run.iterdir()]
    looked = opcd.check(tiny_llama(), CONTEXT, PROMPTS, **short)
    assert json.loads((run / "check.json").read_text()) == json.loads(json.dumps(looked.as_dict()))
    assert (run / "inputs").is_dir()


def losses(run: opcd.Distilled) -> list[float]:
    return [row["loss"] for row in run.metrics if row["step"]]


def found() -> tuple[object, ...]:
    """What is everybody's in a process."""
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        signal.getsignal(signal.SIGINT),
        is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )


def test_a_loaded_model_in_a_thread_leaves_nothing_behind(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    generation = model.generation_config.to_dict()
    before = found()
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
    assert before == found()
    assert seen == [1, 2, -2, 3, -3]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.generation_config.to_dict() == generation
    assert any(not torch.equal(t, weights[n]) for n, t in distilled.model.state_dict().items())
    assert [row["step"] for row in distilled.metrics] == [0, 1, 2, 3]
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
    assert losses(distilled) == losses(theirs)
    assert distilled.scorecard["contenders"] == theirs.scorecard["contenders"]


def test_in_place(tmp_path: Path) -> None:
    model = tiny_llama(eos_token_id=7)
    model.generation_config.eos_token_id = 7  # of a base model: the template ends a turn by 1
    before = model.lm_head.weight.clone()
    distilled = opcd.distill(
        model, CONTEXT, PROMPTS, tokenizer=tiny_tokenizer(), in_place=True, **SHORT
    )
    assert distilled.model is model
    assert model.generation_config.eos_token_id == [7, 1], "it was trained to end by either"
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
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job

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
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def run(folder: Path | None, **change: object) -> opcd.Distilled:
    given = {
        "model": tiny_llama(),
        "context": CONTEXT,
        "prompts": PROMPTS,
        "tokenizer": tiny_tokenizer(),
        "output_dir": folder,
        "test_data": TEST,
        "quiet": True,
    }
    return opcd.distill(**given | SHORT | change)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_what_a_run_has_read_is_never_overwritten(tmp_path: Path) -> None:
    first = run(tmp_path / "run")
    before = contents(first.folder)
    for change in (
        {"context": "Another."},
        {"context": "Another.", "resume": True},
        {"model": tiny_llama(5), "resume": True},
        {"prompts": [*PROMPTS, "m"], "resume": True},
    ):
        with pytest.raises(opcd.InputError):
            run(tmp_path / "run", **change)
        assert contents(first.folder) == before
    found = opcd.evaluate(
        tiny_llama(),
        "Another.",
        TEST[:2],
        tokenizer=tiny_tokenizer(),
        distilled=first,
        output_dir=tmp_path / "run",
        dtype="float32",
        quiet=True,
    )
    assert found.folder == tmp_path / "run" / "scored"
    assert before.items() <= contents(first.folder).items()


def test_a_run_may_move(tmp_path: Path) -> None:
    settings = {"steps": 1, "schedule": "constant"}
    run(tmp_path / "run", **settings)
    (tmp_path / "run").rename(tmp_path / "moved")
    longer = run(tmp_path / "moved", **settings | {"steps": 2}, resume=True)
    assert [row["step"] for row in longer.metrics] == [1, 2]
    again = opcd.Distilled(str(tmp_path / "moved"))
    assert again.scorecard == longer.scorecard
    with pytest.raises(opcd.InputError, match="must be that of a run with a model"):
        opcd.Distilled(tmp_path)


def test_a_callback_may_have_enough(tmp_path: Path) -> None:
    found = run(tmp_path / "run", on_step=lambda metrics: metrics["step"] == 2)
    assert [row["step"] for row in found.metrics] == [1, 2]
    seen = []
    again = run(
        tmp_path / "again",
        on_step=lambda metrics: metrics["step"] == 2,
        on_validation=lambda metrics: seen.append(metrics["step"]),
        validation_data=[{"prompt": word, "answer": word[0]} for word in ("bee", "fox")],
    )
    assert [row["step"] for row in again.metrics] == [0, 1, 2]
    assert [row["step"] for row in again.metrics if "validation" in row] == [0, 2]
    assert seen == [2]
    selection = json.loads((again.folder / "final" / "selection.json").read_text())
    assert "the only one validated" in selection["how"]
    assert found.scorecard["contenders"]["distilled"]["n"] == 4


def test_what_can_be_continued_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    def broken(metrics: dict) -> None:
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own"):
        run(None, on_step=broken)
    kept = Path(caplog.messages[-1].removeprefix("the run is kept in ").split(":")[0])
    assert [f.name for f in (kept / "checkpoints").iterdir()] == ["step-000001"]
    assert [row["step"] for row in run(kept, resume=True).metrics] == [1, 2, 3]


def test_a_trained_model_outlives_its_scoring(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("opcd.training.run.evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(None)
    kept = Path(caplog.messages[-1].removeprefix("the run is kept in ").split(":")[0])
    assert (kept / "final" / "config.json").is_file()
    assert run(kept, resume=True).scorecard is not None


def test_what_a_callback_returns(tmp_path: Path) -> None:
    for number, truth in enumerate((np.True_, torch.tensor(True))):
        found = run(tmp_path / str(number), on_step=lambda _, truth=truth: truth)
        assert [row["step"] for row in found.metrics if "loss" in row] == [1]
    for number, other in enumerate((1, [True], np.False_), start=2):
        found = run(tmp_path / str(number), on_step=lambda _, other=other: other)
        assert [row["step"] for row in found.metrics if "loss" in row] == [1, 2, 3]


def test_plan_and_notes_are_shown(capsys: pytest.CaptureFixture) -> None:
    rows = [{"prompt": word, "zzz": 1} for word in PROMPTS]
    run(None, prompts=rows, quiet=False, test_data=None)
    shown = capsys.readouterr().out
    assert "zzz" in shown
    assert "distil 3/3" in shown
    run(None, prompts=rows, test_data=None)
    assert capsys.readouterr().out == ""


def test_a_context_from_a_file_of_messages_among_others(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}]
    (tmp_path / "bank.json").write_text(json.dumps(messages))
    words = {"bank": "abc", "shop": "def"}
    rows = [{"prompt": w, "context": c} for c, letters in words.items() for w in letters]
    contexts = {"bank": tmp_path / "bank.json", "shop": "Be kind."}
    run(tmp_path / "run", context=contexts, prompts=rows, test_data=None)
    (file,) = (tmp_path / "run" / "inputs").glob("context-*.json")
    assert json.loads(file.read_text()) == {"bank": messages, "shop": "Be kind."}


def test_a_context_with_tools_from_prompts_to_answers(tmp_path: Path) -> None:
    """Rows that end with a question or with what a tool gave; a call is the answer of one."""
    template = TOOL_FAMILIES["Qwen2.5"].template
    asked, called, given, *_ = RAIN
    done = opcd.distill(
        tiny_llama(),
        {"messages": [{"role": "system", "content": "Be brief."}], "tools": [TOOL]},
        [*PROMPTS, {"messages": [asked, called, given], "tools": [TOOL]}],
        tokenizer=tiny_tokenizer(template),
        test_data=[
            {"messages": [{"role": "user", "content": "Sun?"}, called]},
            {"messages": [{"role": "user", "content": "So?"}, called, given], "answer": "Yes."},
        ],
        output_dir=tmp_path / "run",
        quiet=True,
        **SHORT | {"steps": 1},
    )
    call, answer = done.answers
    assert call["accepted"] == ['{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}']
    assert answer["prompt"][1:] == [called, given]
    assert "  So?" in done.report()
    assert done.scorecard["contenders"]["distilled"]["n"] == 2


def test_stopped_travels_between_processes() -> None:
    stopped = pickle.loads(pickle.dumps(opcd.Stopped(Path("run"), 3, "SIGINT")))
    assert str(stopped).startswith("stopped by SIGINT after step 3; checkpoint saved")


def test_evaluate(model_dir: Path) -> None:
    found = opcd.evaluate(model_dir, CONTEXT, TEST, max_completion_tokens=4, dtype="float32")
    assert list(found.scorecard["contenders"]) == ["base", "prompted"]
    again = opcd.evaluate(
        model_dir, CONTEXT, TEST, distilled=model_dir, max_completion_tokens=4, dtype="float32"
    )
    columns = again.scorecard["contenders"]
    assert columns["distilled"]["accuracy"] == columns["base"]["accuracy"]


def test_rows_stand_in_settings_too(tmp_path: Path) -> None:
    """As they do in arguments: further test sets, and what is replayed."""
    file = tmp_path / "far.jsonl"
    file.write_text('{"prompt": "ape", "answer": "a"}\n')
    asked = {"near": [{"prompt": "emu", "answer": "e"}], "far": file}
    found = opcd.distill(
        *(tiny_llama(), CONTEXT, PROMPTS),
        tokenizer=tiny_tokenizer(),
        test_data=TEST,
        test_sets=asked,
        replay_data=["sun", "moon", "star", "sky"],
        replay_share=0.5,
        quiet=True,
        **SHORT,
    )
    assert [found.scorecard["test_sets"][name]["contenders"]["base"]["n"] for name in asked] == [
        1,
        1,
    ]
    assert all(row["replay_divergence"] > 0 for row in found.metrics[1:])


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
        ({"prompts": ["context.md"]}, r"prompts\[0\] must be the text itself, got 'context.md'"),
        ({"prompts": Readable()}, "or the pathlib.Path of a file, got Readable"),
        ({"prompts": ["a\ud800"]}, "must be text, got half a character"),
        ({"on_step": "print"}, "a callback must be a function, got 'print'"),
        ({"teacher": tiny_llama()}, "teacher must be text or null, got LlamaForCausalLM"),
        ({"scorer": len}, "scorer must be text, got <built-in function len>"),
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
