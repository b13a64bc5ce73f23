"""`opcd check` on the tiny model."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import opcd.preflight.check as checks
import opcd.preflight.measure as measuring
from opcd.cli import main
from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation import contenders
from opcd.evaluation.report import check_lines
from opcd.preflight.budget import Budget, Needs, Remedy, budget
from opcd.preflight.check import Checked, check
from opcd.preflight.disk import Disk
from opcd.preflight.memory import Memory
from opcd.preflight.verdict import Measured
from opcd.rollouts.protocol import SamplingParams
from opcd.runtime.memory import Room
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup, prepare
from opcd.training.duration import expected_seconds
from opcd.training.run import train
from tests.conftest import in_groups, tiny_llama, tiny_tokenizer, write_jsonl


class Heard(Progress):
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said += text.splitlines()


def prepared(settings: dict, **overrides: Any) -> Setup:
    config = TrainConfig(**settings | overrides)
    return prepare(config, for_training=config.prompts is not None)


def measured(found: Checked) -> Measured:
    assert found.found.measured is not None, found.verdict
    return found.found.measured


FITS = Budget(
    Needs(Memory({"process": 0}, {"optimizer": 2}), Disk(2, 2)), Room(9, 2), free=2, remedies=[]
)


@pytest.fixture(autouse=True)
def budgets(monkeypatch: pytest.MonkeyPatch) -> Callable[[Budget], None]:
    """Half a second a check, which few tests are about; sets what is found in its place."""

    def found(made: Budget) -> None:
        monkeypatch.setattr(checks, "budget", lambda _: made)

    found(FITS)
    return found


def never(*_: Any) -> Any:
    raise AssertionError("not to be called")


@pytest.fixture
def deaf(tmp_path: Path) -> str:
    """Without attention the next token depends on the last one alone: no context reaches it."""
    model = tiny_llama(3)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    model.save_pretrained(tmp_path / "deaf")
    tiny_tokenizer().save_pretrained(tmp_path / "deaf")
    return str(tmp_path / "deaf")


@pytest.fixture
def many(settings: dict) -> dict:
    """Enough requests to tell, none of which is judged."""
    rows = [{"prompt": f"What is {i}?"} for i in range(45)]
    write_jsonl(Path(settings["prompts"]), rows)
    return settings | {"validation_data": None}


class Loads:
    """The models that are loaded to answer, each when those before it are gone."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._models: list[weakref.ref[torch.nn.Module]] = []
        self._load = contenders.load_for_answers

    def __call__(self, setup: Setup, name: str, params: SamplingParams) -> Any:
        self.check_gone()
        loaded = self._load(setup, name, params)
        self.names.append(name)
        self._models.append(weakref.ref(loaded.model))
        return loaded

    def check_gone(self) -> float:
        assert not [model for model in self._models if model() is not None]
        return 60.0


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    found = Loads()
    monkeypatch.setattr(contenders, "load_for_answers", found)
    return found


def test_the_command(
    settings: dict, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "budget", budget)
    config = Path(settings["output_dir"]).parent / "config.yaml"
    config.write_text(in_groups(settings))
    status = main(["check", "--config", str(config)])
    printed = capsys.readouterr().out
    labels = ("teacher", "student", "saved", "rendering", "without", "answers", "memory", "disk")
    for name in (*labels, "sample", "prompt", "gap", "reach", "accuracy", "time", "verdict"):
        assert f"\n{name} " in f"\n{printed}"
    found = json.loads((Path(settings["output_dir"]) / "check.json").read_text())
    assert status == (0 if found["verdict"]["word"] == "go" else 1)
    assert found["verdict"]["reason"] in printed
    assert found["wrong_inputs"] == ""
    assert found["measured"]["requests"] == 3
    assert found["measured"]["gain"]["requests"] == 3
    assert found["measured"]["empty_context"] == 0
    asked = ["check", "--config", str(config), "--json", "--expected_requests", "5"]
    assert main(asked) == status
    again = json.loads(capsys.readouterr().out)
    assert (found["expected_requests"], again["expected_requests"]) == (None, 5)
    assert again["verdict"] == found["verdict"]
    moving = {"reading_s": 0}  # how fast a machine is
    assert again["measured"] | moving == found["measured"] | moving


def test_what_was_decided_is_said(settings: dict) -> None:
    rows = [{"prompt": word, "answer": "Yes"} for word in ("so", "so", "no")]
    write_jsonl(Path(settings["validation_data"]), rows)
    heard = Heard()
    setup = prepared(settings)
    check(setup, lambda: 60.0, heard)
    assert setup.notes
    assert set(setup.notes) <= set(heard.said)


def test_a_model_that_hears_nothing_needs_no_prompt(many: dict, deaf: str, loads: Loads) -> None:
    found = check(prepared(many, model=deaf), loads.check_gone)
    assert measured(found).changed == 0
    assert abs(measured(found).gap) < 1e-5
    assert measured(found).requests == 45
    assert found.verdict.word == "the prompt changes nothing"
    assert loads.names == [deaf], "once"


def test_answers_are_shown_without_the_prompt_and_with_it(
    many: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few, of those that differ."""
    spoken = {}

    def noted(setup: Setup, cases: Any, said: Any, unprompted: Any, student: Any) -> Measured:
        for case, without, prompted in zip(cases, unprompted.answers, said, strict=True):
            spoken[case.example.text] = (without.text, prompted.text)
        return summarised(setup, cases, said, unprompted, student)

    summarised = measuring.summarised
    monkeypatch.setattr(measuring, "summarised", noted)
    found = check(prepared(many), lambda: 60.0)
    examples = measured(found).examples
    assert len(examples) == len(set(examples)) == 3
    for example in examples:
        assert spoken[example.request] == (example.without, example.prompted)
        assert example.without != example.prompted
    shown = [line for line in found.lines if line.startswith("example   ")]
    assert len(shown) == 3
    assert f"example   {examples[0].request!r}: without the prompt " in shown[0]
    assert found.as_dict()["measured"]["examples"][0]["request"] == examples[0].request


def test_a_larger_teacher_is_held_against_itself(many: dict, deaf: str, loads: Loads) -> None:
    """It says something else than the student, which is nothing that the prompt does."""
    setup = prepared(many, teacher=deaf)
    found = check(setup, loads.check_gone)
    assert measured(found).changed == 0
    assert measured(found).gap > 0.1
    assert found.verdict.word == "the prompt changes nothing"
    assert loads.names == [deaf, setup.config.model]
    assert measured(found).empty_context is None, "two models"


def test_prompts_that_are_not_the_tokenizers_own_end_the_check(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "measure", never)
    setup = prepared(settings)
    case = setup.task.validation[1]
    case.prompt.teacher_ids.append(3)
    found = check(setup, never)
    assert found.verdict.word == "wrong inputs"
    assert found.verdict.evidence == f"{case.source}: the teacher's prompt"
    assert found.found.measured is None
    assert found.as_dict()["measured"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"room": Room(9, 1)}, "more memory than is free (0.0 GB of 0.0 GB); take a smaller model"),
        (
            {"room": Room(9, 1), "remedies": [Remedy({"lora_rank": 16, "learning_rate": 1e-3}, 1)]},
            "; set lora_rank 16, learning_rate 0.001",
        ),
        ({"room": Room(9, 1), "remedies": [Remedy({"lora_rank": 16}, 2)]}, "a smaller model"),
        ({"free": 1}, "a run writes more than there is room for"),
    ],
)
def test_what_does_not_fit_is_not_loaded(
    change: dict,
    says: str,
    settings: dict,
    budgets: Callable[[Budget], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budgets(FITS._replace(**change))
    monkeypatch.setattr(checks, "measure", never)
    found = check(prepared(settings), never)
    assert found.verdict.word == "does not fit"
    assert says in str(found.verdict)


@pytest.mark.parametrize("change", [{"room": Room(None, None)}, {"needs": "RuntimeError: no"}])
def test_no_step_is_tried_where_nobody_knows_whether_it_fits(
    change: dict, settings: dict, budgets: Callable[[Budget], None]
) -> None:
    budgets(FITS._replace(**change))
    found = check(prepared(settings), never)
    assert found.found.fits is None
    assert "time      not measured: nobody knows whether a step would fit" in found.lines


def test_without_prompts_base_and_prompted_are_asked(settings: dict) -> None:
    found = check(prepared(settings, prompts=None), never)
    assert measured(found).requests == 3
    assert found.found.memory_needed is found.found.pays_after is None
    assert not [line for line in found.lines if line.startswith(("memory", "disk", "time"))]


def several_contexts(settings: dict, tmp_path: Path) -> dict:
    contexts = {"one": "Answer with one letter.", "two": "Answer with a number."}
    (tmp_path / "contexts.json").write_text(json.dumps(contexts))
    for part in ("prompts", "validation_data", "test_data"):
        rows = [json.loads(line) for line in Path(settings[part]).read_text().splitlines()]
        named = [row | {"context": "one" if i % 2 else "two"} for i, row in enumerate(rows)]
        write_jsonl(Path(settings[part]), named)
    return settings | {"context": str(tmp_path / "contexts.json")}


@pytest.mark.parametrize(
    "changed",
    [
        lambda settings, _: settings | {"lora_rank": 4},
        lambda settings, _: settings | {"guided_share": 0.5, "max_tokens_per_pass": 20},
        several_contexts,
    ],
    ids=["lora", "guided", "contexts"],
)
def test_runs_of_other_kinds(
    changed: Callable[[dict, Path], dict], settings: dict, tmp_path: Path
) -> None:
    setup = prepared(changed(settings, tmp_path))
    found = check(setup, lambda: expected_seconds(setup))
    assert found.rendering.compared == 3
    assert measured(found).empty_context == 0
    assert found.found.guided_share == setup.config.guided_share
    assert [line for line in found.lines if line.startswith("time      about ")]


def test_when_a_run_pays(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = prepared(settings)
    for reading, pays_after, says in (
        (0.5, 120.0, "takes 500 ms of a request that comes alone, without a prefix cache: a run"),
        (None, None, "takes less than what timing a request varies by"),
    ):
        monkeypatch.setattr(measuring, "_reading_seconds", lambda *_, found=reading: found)
        found = check(setup, lambda: 60.0, expected_requests=100.0)
        assert found.found.pays_after == pays_after
        assert found.found.expected_requests == 100.0
        assert [line for line in found.lines if says in line]
    with pytest.raises(InputError, match="expected_requests must be a positive number, got 0"):
        check(setup, never, expected_requests=0)


def test_a_teacher_that_differs_behind_an_empty_context(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a pass that is wrong: here its prefix is another."""
    setup, make = prepared(settings), measuring.teacher_of

    def other(model: Any, prefixes: dict[str, list[int]], config: TrainConfig) -> Any:
        if prefixes is not setup.task.prefixes:
            prefixes = {name: [*ids[:-1], 77] for name, ids in prefixes.items()}
        return make(model, prefixes, config)

    monkeypatch.setattr(measuring, "teacher_of", other)
    found = check(setup, lambda: 60.0)
    apart = measured(found).empty_context
    assert apart is not None
    assert apart > 1e-3
    assert "passes    behind an empty context teacher and student differ by" in str(found.lines)


def test_what_train_refuses_is_refused(
    settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(**overrides: Any) -> str:
        config = tmp_path / "config.yaml"
        config.write_text(in_groups(settings | overrides))
        assert main(["check", "--config", str(config)]) == 2
        return capsys.readouterr().err

    write_jsonl(tmp_path / "guided.jsonl", [{"prompt": "red", "completion": "r"}])
    guided = {"guided_share": 0.5, "guided_completions": str(tmp_path / "guided.jsonl")}
    assert "guided.jsonl" in refused(**guided)
    none = dict.fromkeys(("prompts", "validation_data", "test_data"))
    assert "there must be requests to train or to measure on, got none" in refused(**none)
    tiny_tokenizer().save_pretrained(tmp_path / "quantised")
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "fp8"}
    model.config.save_pretrained(tmp_path / "quantised")
    assert "quantised by fp8" in refused(model=str(tmp_path / "quantised"))
    assert not Path(settings["output_dir"]).exists()


def test_the_report_of_a_run_repeats_it(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcd.training.run.announce_budget", lambda *_: None)
    settings |= {"steps": 1}
    found, heard = check(prepared(settings), lambda: 60.0), Heard()
    folder = Path(settings["output_dir"])
    folder.mkdir()
    found.write(folder)
    outcome = train(TrainConfig(**settings), progress=heard)
    assert f"verdict   {found.verdict}" in (folder / "report.md").read_text()
    assert heard.said[:4] == found.lines[:4], "what both models see"
    assert "rendering the ids of 3 requests" in heard.said[3]
    assert outcome.evaluation is not None
    card = outcome.evaluation.card
    assert check_lines(folder, card) == found.summary
    assert not [line for line in found.summary if line.startswith("example")], "texts"
    card["measured_by"]["form"] = "of another prompt"
    assert check_lines(folder, card) == [
        "other     check.json is of another prompt, or of other models"
    ]
    (folder / "check.json").write_text("{")
    assert check_lines(folder, card) == []
