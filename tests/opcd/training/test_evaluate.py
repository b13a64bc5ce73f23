"""A run's model scored again: what counts as the run's own evaluation."""

import json
import shutil
from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.config.fields import FIELDS, MEASURING
from opcd.errors import InputError
from opcd.runtime.progress import Progress
from opcd.training.evaluate import evaluate_run
from opcd.training.run import train

OTHERWISE = {  # every field of training alone, with another value than in the run
    "steps": 5,
    "prompts_per_step": 2,
    "completions_per_prompt": 3,
    "turns": "all",
    "source": "recorded",
    "forward_share": 1.0,
    "guided_share": 0.5,
    "guided_completions": "none.jsonl",
    "guided_objective": "cross_entropy",
    "replay_share": 0.5,
    "replay_data": "none.jsonl",
    "return_anchor": 0.5,
    "average_over": "sequences",
    "learning_rate": 1.0,
    "warmup_steps": 7,
    "schedule": "linear",
    "weight_decay": 0.5,
    "max_grad_norm": 0.5,
    "lora_rank": 4,
    "lora_alpha": 1.0,
    "gradient_checkpointing": True,
    "validate_every": 9,
    "save_every": 9,
    "keep_checkpoints": 9,
    "max_minutes": 9.0,
    "trackers": "tensorboard",
    "on_alarm": "stop",
}


class Heard(Progress):
    """What a run tells."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said += text.splitlines()


def test_fields_of_training_change_nothing(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = set(FIELDS) - MEASURING
    assert OTHERWISE.keys() == alone
    settings |= {"steps": 1}
    first = train(TrainConfig(**settings)).evaluation
    curves: list[str] = []
    draw = "opcd.evaluation.report.draw_curve"
    monkeypatch.setattr(draw, lambda _, __, divergence: curves.append(divergence))
    heard = Heard()
    folder, again = evaluate_run(TrainConfig(**settings | OTHERWISE), progress=heard)
    assert folder == Path(settings["output_dir"])
    assert again == first
    assert not [line for line in heard.said if "not as in training" in line]
    assert curves == ["reverse KL"], "the curve is of the run's own training"
    other = TrainConfig(**settings | {"seed": 1, "scorer": "contains"})
    folder, _ = evaluate_run(other, progress=heard)
    assert folder.name == "eval-test"
    assert heard.said[-1] == "note      not as in training: scorer, seed"


def test_another_path_to_the_same_file_is_no_change(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("linked").symlink_to(settings["model"])
    settings |= {"steps": 1}
    train(TrainConfig(**settings))
    paths = ("output_dir", "context", "prompts", "validation_data", "test_data")
    named = {name: Path(settings[name]).name for name in paths} | {"model": "linked"}
    heard = Heard()
    folder, _ = evaluate_run(TrainConfig(**settings | named), progress=heard)
    assert folder == Path("run")
    assert not [line for line in heard.said if "not as in training" in line]
    train(TrainConfig(**settings | named), resume=True, progress=heard)
    assert heard.said[-1].startswith("this run was finished before")


def scored_again(settings: dict) -> tuple[str, list[str]]:
    """The name of the folder that a run's model is scored to, and the notes that are said."""
    heard = Heard()
    folder, _ = evaluate_run(TrainConfig(**settings), progress=heard)
    return folder.name, [line for line in heard.said if line.startswith("note ")]


def test_a_scorecard_is_replaced_by_one_of_the_same_contents_alone(
    settings: dict, tmp_path: Path
) -> None:
    task = tmp_path / "task"
    shutil.copytree(settings["model"], task / "model")
    scorer = task / "scorer.py"
    scorer.write_text("def f(completion, answers): return completion in answers")
    for name in ("context", "prompts", "validation_data", "test_data"):
        settings[name] = shutil.move(settings[name], task)
    settings |= {"steps": 1, "model": str(task / "model"), "output_dir": str(task / "run")}
    settings |= {"scorer": f"python:{scorer}:f"}
    train(TrainConfig(**settings))
    card = (task / "run" / "scorecard.json").read_bytes()

    moved = tmp_path / "moved"
    task.rename(moved)
    settings = {
        name: value.replace(str(task), str(moved)) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    data = Path(settings["test_data"])
    copy = data.rename(moved / "copy.jsonl")
    assert scored_again(settings | {"test_data": str(copy)}) == ("run", [])
    copy.rename(data)
    Path(settings["context"]).write_text("Answer with one letter.\n", encoding="utf-8")
    assert scored_again(settings) == ("run", [])
    saved = json.loads((moved / "run" / "scorecard.json").read_text())
    assert saved["measured_by"] == json.loads(card)["measured_by"]
    card = (moved / "run" / "scorecard.json").read_bytes()

    weights = moved / "model" / "model.safetensors"
    for what, file, old, new in (
        ("test_data", data, b'"cat"', b'"cats"'),
        ("test_data", data, b'"answer": "c"', b'"answer": "t"'),
        ("scorer", moved / "scorer.py", b"in answers", b"in list(answers)"),
        ("model, teacher", weights, weights.read_bytes()[-40:], bytes(40)),
    ):
        kept = file.read_bytes()
        assert old in kept
        file.write_bytes(kept.replace(old, new))
        folder, notes = scored_again(settings)
        assert folder.startswith("eval-test")
        assert notes == [f"note      not as in training: {what}"]
        file.write_bytes(kept)
    assert (moved / "run" / "scorecard.json").read_bytes() == card


def test_training_prompts_may_be_others_or_none(settings: dict) -> None:
    settings |= {"steps": 1}
    train(TrainConfig(**settings))
    prompts = Path(settings["prompts"])
    first, *others = prompts.read_text().splitlines(keepends=True)
    prompts.write_text("".join([*others, first, '{"prompt": "lilac"}\n']))
    assert scored_again(settings) == ("run", [])
    del settings["prompts"]
    assert scored_again(settings) == ("run", [])
    prompts.write_text('{"prompt": "cat"}\n')
    with pytest.raises(InputError, match="must be disjoint"):
        scored_again(settings)
    prompts.unlink()
    lost = f"{prompts} is not there: whether test requests were trained on is not checked"
    assert scored_again(settings) == ("run", [f"note      {lost}"])


def test_what_a_run_was_measured_by_may_not_be_known(settings: dict) -> None:
    settings |= {"steps": 1}
    train(TrainConfig(**settings))
    file = Path(settings["output_dir"]) / "final" / "selection.json"
    selection = json.loads(file.read_text())
    del selection["measured_by"]
    file.write_text(json.dumps(selection))
    folder, (note,) = scored_again(settings)
    assert folder == "eval-test"
    assert "not known to be as in training" in note


def test_a_scorecard_is_written_behind_its_report(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between them is scored when it is resumed."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    config = TrainConfig(**settings | {"steps": 1, "schedule": "constant"})
    train(config)
    config.steps = 2
    with monkeypatch.context() as patch:
        patch.setattr("opcd.evaluation.evaluate.write_report", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, resume=True)
    again = train(config, resume=True).evaluation
    assert again is not None
    assert again.card["selection"]["steps_done"] == 2
