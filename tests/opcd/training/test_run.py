"""Whole runs through the command line: what they write, how they stop, how they continue."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opcd.cli import main
from opcd.evaluation.report import read_metrics
from opcd.objective import Targets
from opcd.training.checkpoint import list_checkpoints
from tests.conftest import write_jsonl


def write_config(settings: dict, **overrides: object) -> str:
    path = Path(settings["output_dir"]).parent / "config.yaml"
    path.write_text(yaml.safe_dump(settings | overrides))
    return str(path)


def losses(run: Path | str) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(run) / "metrics.jsonl")]


def start(config: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "opcd.cli", "train", "--config", config, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def wait_for_step(run: Path | str, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(losses(run)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_run_leaves_everything_it_promises(
    settings: dict, lora_rank: int, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", "--config", write_config(settings), f"--lora_rank={lora_rank}"]) == 0
    run = Path(settings["output_dir"])
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["lora_rank"] == lora_rank
    assert resolved["max_grad_norm"] == 1.0
    metrics = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in metrics if "validation" in row] == [3, 6]
    card = json.loads((run / "scorecard.json").read_text())
    for column in ("base", "prompted", "distilled", "distilled_prompted"):
        assert card["contenders"][column]["n"] == 4
    assert card["divergence"]["after"] < card["divergence"]["before"]
    assert card["selection"]["step"] in (3, 6)
    assert card["selection"]["data"] == settings["validation_data"]
    assert card["data"] == {"part": "test", "file": settings["eval_data"]}
    assert (run / "curve.png").stat().st_size > 5000
    assert "curve.png" in (run / "report.md").read_text()
    assert len((run / "answers.jsonl").read_text().splitlines()) == 4
    printed = capsys.readouterr().out
    assert "distilled_prompted" in printed
    assert "from_pretrained" in printed

    final = AutoModelForCausalLM.from_pretrained(run / "final")
    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    AutoTokenizer.from_pretrained(run / "final")
    changed = final.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight
    assert changed.abs().max() > 1e-4

    # The same scorecard again from the files alone.
    first = card
    assert main(["eval", "--config", str(run / "config.yaml")]) == 0
    assert json.loads((run / "scorecard.json").read_text()) == first


def test_the_same_seed_gives_the_same_run_and_another_does_not(settings: dict) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = settings["output_dir"] + name
        config = write_config(settings, output_dir=run, seed=seed)
        assert main(["train", "--config", config]) == 0
        found.append(losses(run))
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_kill_and_resume_gives_the_losses_of_an_uninterrupted_run(
    settings: dict, lora_rank: int
) -> None:
    config = write_config(settings, steps=14, lora_rank=lora_rank)
    whole = settings["output_dir"] + "-whole"
    assert main(["train", "--config", config, "--output_dir", whole]) == 0

    process = start(config)
    run = Path(settings["output_dir"])
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 5 <= len(losses(run)) < 14
    # What a kill in the middle of a save, a deletion and a line leaves behind.
    (run / "checkpoints" / ".writing-step-000099").mkdir()
    (run / "checkpoints" / ".removing-step-000001").mkdir()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')

    assert main(["train", "--config", str(run / "config.yaml"), "--resume"]) == 0
    assert losses(run) == losses(whole)
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert not any(name.startswith(".") for name in names), names
    for file in sorted((Path(whole) / "final").glob("*.safetensors")):
        assert file.read_bytes() == (run / "final" / file.name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits_cleanly(
    settings: dict, number: signal.Signals
) -> None:
    config = write_config(settings, steps=100_000, save_every=100_000, validate_every=100_000)
    process = start(config)
    run = Path(settings["output_dir"])
    wait_for_step(run, 3, process)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert f"stopped by {number.name}" in printed
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    steps = len(losses(run))
    assert checkpoint.name == f"step-{steps:06d}"
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    assert state["steps_done"] == steps
    assert not (run / "final").exists()


def test_old_checkpoints_go_and_the_best_stays(settings: dict) -> None:
    config = write_config(settings, steps=12, validate_every=3, save_every=1, keep_checkpoints=2)
    assert main(["train", "--config", config]) == 0
    run = Path(settings["output_dir"])
    best = json.loads((run / "final" / "selection.json").read_text())["step"]
    kept = {int(p.name.removeprefix("step-")) for p in list_checkpoints(run / "checkpoints")}
    assert kept == {11, 12, best}
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{best:06d}")


def test_a_run_without_validation_takes_the_last_step_and_says_so(settings: dict) -> None:
    config = write_config(settings, validation_data=None)
    assert main(["train", "--config", config]) == 0
    card = json.loads((Path(settings["output_dir"]) / "scorecard.json").read_text())
    assert card["selection"]["how"] == "step 6, the last (no validation data)"


def test_a_run_without_test_data_ends_with_a_model(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", "--config", write_config(settings, eval_data=None)]) == 0
    run = Path(settings["output_dir"])
    assert (run / "final" / "model.safetensors").is_file()
    assert not (run / "scorecard.json").exists()
    assert str(run / "final") in capsys.readouterr().out


def test_base_and_prompted_alone_before_anything_is_trained(settings: dict) -> None:
    assert main(["eval", "--config", write_config(settings), "--distilled", "none"]) == 0
    folder = Path(settings["output_dir"]) / "eval-none-test"
    card = json.loads((folder / "scorecard.json").read_text())
    assert card["contenders"]["prompted"]["n"] == 4
    assert set(card["contenders"]) == {"base", "prompted"}
    assert card["internalised"] is None


def test_a_resumed_run_must_see_the_same_prompts(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    config = write_config(settings)
    assert main(["train", "--config", config]) == 0
    before = losses(settings["output_dir"])
    prompts = Path(settings["prompts"])
    prompts.write_text(prompts.read_text().replace("navy", "lava"))
    assert main(["train", "--config", config, "--resume", "--steps=8"]) == 2
    assert "give other token ids" in capsys.readouterr().err
    assert losses(settings["output_dir"]) == before


def test_a_damaged_checkpoint_is_named(settings: dict, capsys: pytest.CaptureFixture) -> None:
    config = write_config(settings)
    assert main(["train", "--config", config]) == 0
    newest = list_checkpoints(Path(settings["output_dir"]) / "checkpoints")[-1]
    for name, length in (("model.safetensors", 500), ("trainer.pt", 500), ("trainer.pt", 0)):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[:length] or b"garbage")
        assert main(["train", "--config", config, "--resume"]) == 2
        assert f"{newest} must hold a checkpoint" in capsys.readouterr().err
        (newest / name).write_bytes(whole)
    assert main(["train", "--config", config, "--resume"]) == 0


def test_a_model_whose_files_lack_weights_is_refused(
    settings: dict, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(settings["model"], model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert main(["train", "--config", write_config(settings, model=str(model))]) == 2
    assert "lack 1, such as model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err
    assert main(["train", "--config", write_config(settings)]) == 0, "the folder holds no run yet"


def test_an_evaluation_on_other_data_leaves_the_runs_scorecard_alone(settings: dict) -> None:
    config = write_config(settings)
    assert main(["train", "--config", config]) == 0
    run = Path(settings["output_dir"])
    own = (run / "scorecard.json").read_text()
    other = write_jsonl(run.parent / "other.jsonl", [{"prompt": "yak", "answer": "y"}])
    assert main(["eval", "--config", config, "--eval_data", str(other)]) == 0
    assert (run / "scorecard.json").read_text() == own
    card = json.loads((run / "eval-other" / "scorecard.json").read_text())
    assert card["contenders"]["base"]["n"] == 1
    assert main(["eval", "--config", config, "--eval_data", str(other)]) == 0
    assert (run / "eval-other-2" / "scorecard.json").is_file(), "the first must not be replaced"
    checkpoint = str(list_checkpoints(run / "checkpoints")[-1])
    assert main(["eval", "--config", config, "--distilled", checkpoint]) == 0
    assert len(list(run.glob("eval-*-step-000006-test/scorecard.json"))) == 1


def test_a_finished_run_can_be_prolonged(settings: dict) -> None:
    config = write_config(settings)
    assert main(["train", "--config", config]) == 0
    assert main(["train", "--config", config, "--resume", "--steps=8"]) == 0
    assert len(losses(settings["output_dir"])) == 8


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    settings: dict, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opcd.training.loop import Distiller

    score = Distiller.score

    def poisoned(self: Distiller, *arguments: object) -> Targets:
        found = score(self, *arguments)
        return found if self.steps_done < 3 else found._replace(hidden=found.hidden * torch.nan)

    monkeypatch.setattr(Distiller, "score", poisoned)
    assert main(["train", "--config", write_config(settings)]) == 2
    assert "the loss must be finite" in capsys.readouterr().err
    run = Path(settings["output_dir"])
    assert list_checkpoints(run / "checkpoints")[-1].name == "step-000003"
    monkeypatch.setattr(Distiller, "score", score)
    resume = ["train", "--config", str(run / "config.yaml"), "--resume", "--learning_rate=1e-4"]
    assert main(resume) == 0
    assert "continuing with learning_rate 0.0001, was 0.003" in capsys.readouterr().out
    rates = [row["learning_rate"] for row in read_metrics(run / "metrics.jsonl")]
    assert rates == [3e-3] * 3 + [1e-4] * 3
