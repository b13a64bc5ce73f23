"""Whole runs through the command line: what they write, how they stop, how they continue."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import opcd
from opcd.cli import main
from opcd.config import TrainConfig
from opcd.config.settings import gather
from opcd.errors import InputError
from opcd.objective import Targets
from opcd.runtime.alone import alone
from opcd.runtime.files import read_jsonl, read_metrics
from opcd.runtime.progress import Progress
from opcd.training.checkpoint import STATE_FILE, list_checkpoints
from opcd.training.run import train
from opcd.training.validation import Validation
from tests.conftest import in_groups, tiny_llama, tiny_settings, write_jsonl


def write_config(settings: dict, **overrides: object) -> str:
    path = Path(settings["output_dir"]).parent / "config.yaml"
    path.write_text(in_groups(settings | overrides))
    return str(path)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A folder with the tiny task and its finished run; tests take copies of it."""
    folder = tmp_path_factory.mktemp("once")
    config = write_config(tiny_settings(folder, model_dir))
    assert main(["train", "--config", config]) == 0
    return folder


@pytest.fixture
def finished(once: Path, settings: dict, tmp_path: Path) -> str:
    """The configuration of a run with `settings` that has finished, in its own folder."""
    run = tmp_path / "run"
    shutil.copytree(once / "run", run)
    for name in ("config.yaml", "scorecard.json", "report.md", "final/selection.json"):
        text = (run / name).read_text()
        (run / name).write_text(text.replace(str(once), str(tmp_path)))
    return write_config(settings)


class Until(Progress):
    """Ends a run after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.ends = step
        self.steps = 0

    def part(self, note: str, metrics: dict | None = None) -> None:
        self.steps += 1

    def stop(self) -> str | None:
        return "the test" if self.steps == self.ends else None


def losses(run: Path | str) -> list[float]:
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return [row["loss"] for row in rows if row["step"]]


def start(config: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "opcd.cli", "train", "--config", config, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # A job in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_step(run: Path | str, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while len(losses(run)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


def test_a_run_ends_in_time_with_a_model_and_goes_on(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    config = write_config(settings, steps=50, schedule="linear")
    assert main(["train", "--config", config, "--max_minutes=1e-6", "--json"]) == 0
    run = Path(settings["output_dir"])
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [0, 1]
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads((run / "scorecard.json").read_text())
    assert json.loads((run / "final" / "selection.json").read_text())["steps_done"] == 1
    assert main(["train", "--config", config, "--resume", "--max_minutes=1e-6"]) == 0
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [0, 1, 2]
    assert (
        not (run / "changes.jsonl").exists() or "max_minutes" in (run / "changes.jsonl").read_text()
    )


@pytest.mark.usefixtures("finished")
def test_base_prompted_and_distilled_answer_the_same_message(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    run = Path(settings["output_dir"])
    assert main(["chat", str(run), "--message", "cat"]) == 0
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["prompt"][-1]["content"] == "cat"]
    assert shown == {name: row[name] for name in ("base", "prompted", "distilled")}


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_run_leaves_everything_it_promises(
    settings: dict, lora_rank: int, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", "--config", write_config(settings), f"--lora_rank={lora_rank}"]) == 0
    run = Path(settings["output_dir"])
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["lora"]["lora_rank"] == lora_rank
    assert resolved["optimizer"]["max_grad_norm"] == 1.0
    metrics = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in metrics if "validation" in row] == [0, 3, 6]
    card = json.loads((run / "scorecard.json").read_text())
    for column in ("base", "prompted", "distilled", "distilled_prompted"):
        assert card["contenders"][column]["n"] == 4
    assert card["divergence"]["after"] < card["divergence"]["before"]
    assert card["selection"]["step"] in (3, 6)
    assert card["selection"]["data"] == settings["validation_data"]
    assert card["data"] == {"part": "test", "file": settings["test_data"]}
    assert (run / "curve.png").stat().st_size > 5000
    report = (run / "report.md").read_text()
    assert "curve.png" in report
    assert report.endswith(f"\nopcd {opcd.__version__}, {date.today().isoformat()}.\n")
    assert len((run / "answers.jsonl").read_text().splitlines()) == 4
    printed = capsys.readouterr().out
    assert "distilled_prompted" in printed
    stand = len("#user\n")  # what the template writes in front of a request without a context
    saved = len("#system\nAnswer with one letter.#\n")
    tokens = f"{stand + saved} tokens where {stand} stand without it ({saved} saved), computed"
    assert f"\ncontext   {tokens}" in printed
    assert printed.startswith("teacher   sees ")
    assert "\nmemory    " in printed
    assert "from_pretrained" in printed

    final = AutoModelForCausalLM.from_pretrained(run / "final")
    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    AutoTokenizer.from_pretrained(run / "final")
    changed = final.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight
    assert changed.abs().max() > 1e-4

    page = (Path(opcd.__file__).parent.parent / "docs" / "files.md").read_text(encoding="utf-8")
    kept = {p.name for p in run.iterdir()} - {"checkpoints", "final"}
    keys = {key for row in metrics for key in (*row, *row.get("validation", ()))} | set(card)
    assert not [name for name in kept | keys if f"`{name}" not in page]

    # The same scorecard again from the files alone.
    first = card
    assert main(["eval", "--config", str(run / "config.yaml")]) == 0
    assert json.loads((run / "scorecard.json").read_text()) == first


def test_the_same_seed_gives_the_same_run_and_another_does_not(once: Path, settings: dict) -> None:
    found = []
    for seed in (0, 1):
        run = f"{settings['output_dir']}-{seed}"
        settings |= {"output_dir": run, "seed": seed, "validation_data": None, "test_data": None}
        train(TrainConfig(**settings))
        found.append(losses(run))
    assert found[0] == losses(once / "run")
    assert found[0] != found[1]


@pytest.mark.parametrize("overrides", [{}, {"lora_rank": 4}, {"guided_share": 0.5}], ids=str)
def test_kill_and_resume_gives_the_losses_of_an_uninterrupted_run(
    settings: dict, overrides: dict
) -> None:
    config = write_config(settings, steps=14, test_data=None, **overrides)
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


def test_a_signal_finishes_the_step_saves_and_says_so_by_its_status(settings: dict) -> None:
    config = write_config(settings, steps=100_000, save_every=100_000, validate_every=100_000)
    process = start(config)
    run = Path(settings["output_dir"])
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "stopped by SIGINT" in printed
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    steps = len(losses(run))
    assert checkpoint.name == f"step-{steps:06d}"
    state = torch.load(checkpoint / "trainer.pt", weights_only=True)
    assert state["steps_done"] == steps
    assert not (run / "final").exists()


def test_old_checkpoints_go_and_the_best_stays(settings: dict) -> None:
    """While a run goes on: the newest can be continued, the others hold weights alone."""
    often = {"steps": 100, "validate_every": 3, "save_every": 1, "keep_checkpoints": 2}
    assert train(TrainConfig(**settings | often), progress=Until(8)).stopped == "the test"
    run = Path(settings["output_dir"])
    found = list_checkpoints(run / "checkpoints")
    best = torch.load(found[-1] / "trainer.pt", weights_only=True)["best"]["step"]
    assert best in (3, 6)
    assert [int(p.name.removeprefix("step-")) for p in found] == [best, 7, 8]
    assert [(p / "trainer.pt").exists() for p in found] == [False] * (len(found) - 1) + [True]
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{best:06d}")


@pytest.mark.parametrize(("schedule", "lora_rank"), [("constant", 0), ("linear", 4)])
def test_a_finished_run_keeps_what_it_needs(
    settings: dict,
    schedule: str,
    lora_rank: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The newest checkpoint where steps may be added; what was not scored is, and not trained."""
    config = write_config(settings, schedule=schedule, lora_rank=lora_rank)
    assert main(["train", "--config", config]) == 0
    run = Path(settings["output_dir"])
    left = [p.name for p in list_checkpoints(run / "checkpoints")]
    assert left == (["step-000006"] if schedule == "constant" else [])
    card = (run / "scorecard.json").read_text()
    (run / "scorecard.json").unlink()
    monkeypatch.setattr("opcd.training.loop.Distiller.step", None)  # it must not be called
    assert main(["train", "--config", config, "--resume"]) == 0
    assert (run / "scorecard.json").read_text() == card
    assert "finished before" not in capsys.readouterr().out
    monkeypatch.setattr("opcd.training.run.evaluate", None)  # and now this neither
    assert main(["train", "--config", config, "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "this run was finished before: nothing is left to do" in printed
    assert ("more steps would prolong it" in printed) == (schedule == "constant")
    assert f"report       {run / 'report.md'}" in printed
    assert f"score again  opcd eval --config {run / 'config.yaml'}" in printed


def test_a_prolonged_run_keeps_a_model_that_is_still_the_best(
    settings: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Its checkpoint is gone, since final/ holds it; the steps that follow are worse."""
    grades = iter([0.0, 0.9, 0.1, 0.2])

    def graded(self: Validation, answers: list) -> list[float]:
        return [0.5 if answers is self.said else next(grades)] * 3

    monkeypatch.setattr(Validation, "_right", graded)
    config = write_config(settings, validate_every=3, test_data=None)
    assert main(["train", "--config", config]) == 0
    run = Path(settings["output_dir"])
    score = f"score it     opcd eval --config {run / 'config.yaml'} --test_data FILE\n"
    assert capsys.readouterr().out.endswith(score)
    weights = (run / "final" / "model.safetensors").read_bytes()
    assert main(["train", "--config", config, "--resume", "--steps=8"]) == 0
    selection = json.loads((run / "final" / "selection.json").read_text())
    assert (selection["step"], selection["steps_done"]) == (3, 8)
    assert "step 3 of 8" in selection["how"]
    assert (run / "final" / "model.safetensors").read_bytes() == weights


def test_a_finished_run_is_not_scored_behind_another_context(
    finished: str, settings: dict, capsys: pytest.CaptureFixture
) -> None:
    Path(settings["context"]).write_text("Answer with two letters.")
    assert main(["train", "--config", finished, "--resume"]) == 2
    assert "give other token ids" in capsys.readouterr().err


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(
    finished: str, settings: dict, capsys: pytest.CaptureFixture
) -> None:
    run = Path(settings["output_dir"])
    before = losses(run)
    shutil.rmtree(run / "checkpoints")
    assert main(["train", "--config", finished, "--resume", "--steps=8"]) == 2
    assert "can be prolonged from its newest checkpoint, got none" in capsys.readouterr().err
    assert losses(run) == before


def test_an_adapter_alone_is_scored_on_its_base(settings: dict) -> None:
    """A checkpoint of LoRA's, as the model that is made of it."""
    alone = {"lora_rank": 4, "steps": 2, "validation_data": None, "test_data": None}
    train(TrainConfig(**settings | alone))
    run = Path(settings["output_dir"])
    (adapter,) = list_checkpoints(run / "checkpoints")
    config = write_config(settings, lora_rank=4)
    answers = []
    for model in (adapter, run / "final"):
        where = run.parent / f"scored-{model.name}"
        command = ["eval", "--config", config, "--distilled", str(model), "--save_to", str(where)]
        assert main(command) == 0
        rows = read_jsonl(where / "answers.jsonl")
        # The adapter is merged in one of both: nats differ by rounding.
        missed = [row.pop("distilled_nats")["missed"] for row in rows]
        answers.append((rows, [nats for of_row in missed for nats in of_row]))
    (rows, nats), (same, near) = answers
    assert rows == same
    assert near == pytest.approx(nats, abs=1e-5)


def limit_files(size: int) -> Callable[[], None]:
    """For a child: writing past this many bytes of a file fails, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_save_that_fails_keeps_the_checkpoint_before_it(settings: dict) -> None:
    """The weights fit, the optimizer's state does not: nothing half written stays."""
    settings |= {"steps": 4, "save_every": 2, "validation_data": None, "test_data": None}
    train(TrainConfig(**settings), progress=Until(2))
    config, run = write_config(settings), Path(settings["output_dir"])
    (kept,) = list_checkpoints(run / "checkpoints")
    weights = (kept / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-m", "opcd.cli", "train", "--config", config, "--resume"],
        capture_output=True,
        text=True,
        preexec_fn=limit_files(weights + 1000),
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "step-000004 must be written, got" in done.stderr
    assert "needs about 0.4 MB, and" in done.stderr
    assert "step-000002 is kept" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert main(["train", "--config", config, "--resume"]) == 0


def test_room_is_checked_before_the_first_step(
    settings: dict, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opcd.training.checkpoint.free_bytes", lambda _: 500_000)
    assert main(["train", "--config", write_config(settings)]) == 2
    assert "output_dir must have room for the run's checkpoints, about" in capsys.readouterr().err
    assert losses(settings["output_dir"]) == []
    monkeypatch.undo()
    settings |= {"steps": 1, "validation_data": None, "test_data": None}
    assert main(["train", "--config", write_config(settings)]) == 0, "the folder holds no run yet"


def test_a_run_without_validation_takes_the_last_step_and_says_so(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    config = write_config(settings, steps=2, validation_data=None, test_data=None)
    assert main(["train", "--config", config]) == 0
    assert "is not known: nothing was kept to measure on\n" in capsys.readouterr().out
    file = Path(settings["output_dir"]) / "final" / "selection.json"
    assert json.loads(file.read_text())["how"] == "step 2, the last (no validation data)"


def test_a_run_without_test_data_ends_with_a_model(
    settings: dict, capsys: pytest.CaptureFixture
) -> None:
    config = write_config(settings, test_data=None, steps=1)
    assert main(["train", "--config", config]) == 0
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
    finished: str, settings: dict, capsys: pytest.CaptureFixture
) -> None:
    before = losses(settings["output_dir"])
    prompts = Path(settings["prompts"])
    prompts.write_text(prompts.read_text().replace("navy", "lava"))
    assert main(["train", "--config", finished, "--resume", "--steps=8"]) == 2
    assert "give other token ids" in capsys.readouterr().err
    assert losses(settings["output_dir"]) == before


def test_a_resumed_run_must_go_on_from_the_same_model(
    finished: str, settings: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of the same name: the teacher would be another in the middle of a run."""
    folder = Path(settings["model"])
    shutil.copytree(folder, tmp_path / "kept")
    try:
        tiny_llama(seed=7).save_pretrained(folder)
        assert main(["train", "--config", finished, "--resume", "--steps=8"]) == 2
        assert "must go on from the model it was started with" in capsys.readouterr().err
    finally:
        shutil.copytree(tmp_path / "kept", folder, dirs_exist_ok=True)
    assert main(["train", "--config", finished, "--resume", "--steps=8"]) == 0


def test_a_resumed_run_must_choose_by_the_same_validation_data(
    finished: str, settings: dict, capsys: pytest.CaptureFixture
) -> None:
    """Another prompt or another answer would leave the best checkpoint of before standing."""
    data = Path(settings["validation_data"])
    kept = data.read_text()
    for old, new in (("pear", "peach"), ('"answer": "p"', '"answer": "q"')):
        assert old in kept
        data.write_text(kept.replace(old, new))
        for more in (["--steps=8"], []):  # from a checkpoint, and a finished run
            capsys.readouterr()
            assert main(["train", "--config", finished, "--resume", *more]) == 2
            message = capsys.readouterr().err
            assert "by the validation data it was started with" in message
            assert f"restore '{data}', or start another output_dir" in message
    data.write_text(kept)
    assert main(["train", "--config", finished, "--resume"]) == 0
    file = Path(settings["output_dir"]) / "final" / "selection.json"
    selection = json.loads(file.read_text())
    del selection["selection_fingerprint"]  # a run of before it was kept
    file.write_text(json.dumps(selection))
    data.write_text(kept.replace("pear", "peach"))
    assert main(["train", "--config", finished, "--resume"]) == 0


def test_a_run_is_one_process_at_a_time(settings: dict) -> None:
    folder = Path(settings["output_dir"])
    with alone(folder, "run"), pytest.raises(InputError, match="one run's at a time"):
        train(TrainConfig(**settings))
    assert not (folder / "metrics.jsonl").exists()


def test_what_is_known_of_settings_outlives_a_resumed_run(finished: str, settings: dict) -> None:
    """Where each value came from, and settings that are others when it is scored at last."""
    run = Path(settings["output_dir"])
    own = gather({}, run / "config.yaml").origins
    assert main(["train", "--config", str(run / "config.yaml"), "--resume", "--steps=8"]) == 0
    after = gather({}, run / "config.yaml").origins
    assert after == own | {"steps": "command line"}
    (run / "scorecard.json").unlink()
    more = ["--resume", "--keep_checkpoints=7"]
    assert main(["train", "--config", str(run / "config.yaml"), *more]) == 0
    assert gather({}, run / "config.yaml").keep_checkpoints == 7
    assert main(["verify", str(run)]) == 0


def test_an_interrupt_ends_the_scoring_of_a_trained_run(
    finished: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    (Path(settings["output_dir"]) / "scorecard.json").unlink()

    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("opcd.training.run.evaluate", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells have it ignored
    try:
        assert main(["train", "--config", finished, "--resume"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_scorer_that_raises_may_be_mended(settings: dict, tmp_path: Path) -> None:
    """Nothing is lost by it, and the run goes on with its new text."""
    scorer, run = tmp_path / "scorer.py", Path(settings["output_dir"])
    scorer.write_text(
        "from pathlib import Path\n"
        f"rows = Path({str(run / 'metrics.jsonl')!r})\n"
        "def f(completion, answers):\n"
        "    if rows.exists() and rows.read_text().count('loss') > 1:\n"
        "        raise RuntimeError('of a user')\n"
        "    return completion in answers\n"
    )
    settings |= {"scorer": f"python:{scorer}:f", "steps": 4, "validate_every": 1, "save_every": 9}
    with pytest.raises(Exception, match="of a user"):
        train(TrainConfig(**settings))
    kept = [folder.name for folder in list_checkpoints(run / "checkpoints")]
    step = int(kept[-1].removeprefix("step-"))
    rows = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["step"] == step
    assert "validation" not in rows[-1]
    assert "validation" in rows[-2]
    scorer.write_text("def f(completion, answers): return completion in answers")
    train(TrainConfig(**settings), resume=True)
    (change,) = (json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines())
    before, after = change["changed"]["scorer"]
    assert before != after
    selection = json.loads((run / "final" / "selection.json").read_text())
    assert step < selection["step"] <= 4


def test_a_damaged_checkpoint_is_named(
    finished: str, settings: dict, capsys: pytest.CaptureFixture
) -> None:
    newest = list_checkpoints(Path(settings["output_dir"]) / "checkpoints")[-1]
    for name, length in (("model.safetensors", 500), ("trainer.pt", 500), ("trainer.pt", 0)):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[:length] or b"garbage")
        assert main(["train", "--config", finished, "--resume", "--steps=8"]) == 2
        said = capsys.readouterr().err
        of_the_file = f"{newest / name} must be a safetensors file"
        assert f"{newest} must hold a checkpoint" in said or of_the_file in said
        (newest / name).write_bytes(whole)
    assert main(["train", "--config", finished, "--resume", "--steps=8"]) == 0


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
    settings |= {"steps": 1, "validation_data": None, "test_data": None}
    assert main(["train", "--config", write_config(settings)]) == 0, "the folder holds no run yet"


def test_an_evaluation_on_other_data_leaves_the_runs_scorecard_alone(
    finished: str, settings: dict
) -> None:
    run = Path(settings["output_dir"])
    own = (run / "scorecard.json").read_text()
    other = write_jsonl(run.parent / "other.jsonl", [{"prompt": "yak", "answer": "y"}])
    assert main(["eval", "--config", finished, "--test_data", str(other)]) == 0
    assert (run / "scorecard.json").read_text() == own
    card = json.loads((run / "eval-other" / "scorecard.json").read_text())
    assert card["contenders"]["base"]["n"] == 1
    assert main(["eval", "--config", finished, "--test_data", str(other)]) == 0
    assert (run / "eval-other-2" / "scorecard.json").is_file(), "the first must not be replaced"
    checkpoint = str(list_checkpoints(run / "checkpoints")[-1])
    assert main(["eval", "--config", finished, "--distilled", checkpoint]) == 0
    assert len(list(run.glob("eval-*-step-000006-test/scorecard.json"))) == 1


def test_a_finished_run_can_be_prolonged(
    finished: str, settings: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = Path(settings["output_dir"])
    prolong = ["train", "--config", finished, "--resume", "--steps=8"]
    with monkeypatch.context() as killed:
        killed.setattr("opcd.training.run.evaluate", None)
        with pytest.raises(TypeError):
            main(prolong)
    assert len(losses(run)) == 8
    assert main(prolong) == 0  # the report there is of the shorter run
    assert "finished before" not in capsys.readouterr().out
    assert json.loads((run / "scorecard.json").read_text())["selection"]["steps_done"] == 8


def test_a_run_of_a_version_before_goes_on(finished: str, settings: dict) -> None:
    """Which validated after steps alone, and measured no gap and nothing of the prompted model."""
    run = Path(settings["output_dir"])
    _, *rows = read_metrics(run / "metrics.jsonl")
    old = {"accuracy", "divergence", "time_s"}
    for row in rows:
        if "validation" in row:
            row["validation"] = {k: v for k, v in row["validation"].items() if k in old}
    write_jsonl(run / "metrics.jsonl", rows)
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    state = torch.load(checkpoint / STATE_FILE, weights_only=True)
    state["best"] = {k: v for k, v in state["best"].items() if k in old | {"step"}}
    torch.save(state, checkpoint / STATE_FILE)
    (run / "scorecard.json").unlink()
    assert main(["train", "--config", finished, "--resume", "--steps=8"]) == 0
    assert len(losses(run)) == 8
    assert (run / "scorecard.json").is_file()


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    settings: dict, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opcd.training.loop import Distiller

    score = Distiller.score

    def poisoned(self: Distiller, *arguments: object) -> Targets:
        found = score(self, *arguments)
        return found if self.steps_done < 3 else found._replace(hidden=found.hidden * torch.nan)

    monkeypatch.setattr(Distiller, "score", poisoned)
    assert main(["train", "--config", write_config(settings, test_data=None)]) == 2
    assert "the loss must be finite" in capsys.readouterr().err
    run = Path(settings["output_dir"])
    assert list_checkpoints(run / "checkpoints")[-1].name == "step-000003"
    monkeypatch.setattr(Distiller, "score", score)
    resume = ["train", "--config", str(run / "config.yaml"), "--resume", "--learning_rate=1e-4"]
    assert main(resume) == 0
    assert "continuing with learning_rate 0.0001, was 0.003" in capsys.readouterr().out
    rows = read_metrics(run / "metrics.jsonl")
    rates = [row["learning_rate"] for row in rows if row["step"]]
    assert rates == [3e-3] * 3 + [1e-4] * 3
