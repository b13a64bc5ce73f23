"""A run's model scored again: what counts as the run's own evaluation."""

from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.config.fields import FIELDS, MEASURING
from opcd.runtime.progress import Progress
from opcd.training.evaluate import evaluate_run
from opcd.training.run import train

OTHERWISE = {  # every field of training alone, with another value than in the run
    "steps": 5,
    "prompts_per_step": 2,
    "completions_per_prompt": 3,
    "forward_share": 1.0,
    "guided_share": 0.5,
    "guided_completions": "none.jsonl",
    "guided_objective": "cross_entropy",
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
    Path("copy.jsonl").write_bytes(Path("test.jsonl").read_bytes())
    named |= {"test_data": "copy.jsonl"}
    folder, _ = evaluate_run(TrainConfig(**settings | named), progress=heard)
    assert folder == Path("run") / "eval-copy"
