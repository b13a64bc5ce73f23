"""What a run needs beside what there is."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import opcd.preflight.budget as budgets
from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.preflight.budget import Budget, Needs, budget, budget_lines, check_memory
from opcd.preflight.disk import REPORT_BYTES, scored_bytes
from opcd.runtime import memory
from opcd.runtime.files import folder_bytes, shown_size
from opcd.runtime.memory import Room, memory_room, resident_memory
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import prepare
from opcd.training import checkpoint, run
from tests.conftest import write_jsonl


def of(settings: dict, **overrides: Any) -> Budget:
    return budget(prepare(TrainConfig(**settings | overrides), for_training=True))


def needs(made: Budget) -> Needs:
    assert isinstance(made.needs, Needs), made.needs
    return made.needs


def test_what_answers_take(settings: dict) -> None:
    """Every file that grows with the requests; of a run with few steps the report is smaller."""
    rows = [{"prompt": f"how much is {i} and {i}", "answer": str(2 * i)} for i in range(99)]
    write_jsonl(Path(settings["test_data"]), rows)
    words = " ".join(f"w{i}" for i in range(20))
    Path(settings["context"]).write_text(f"Answer with a number. {words}", encoding="utf-8")
    settings |= {"steps": 1, "validation_data": None, "elsewhere_prompts": 45, "leak_tokens": 16}
    setup = prepare(TrainConfig(**settings), for_training=True)
    run.train(TrainConfig(**settings))
    names = ("answers.jsonl", "answers.csv", "elsewhere.jsonl", "leak.jsonl")
    taken = [(Path(settings["output_dir"]) / name).stat().st_size for name in names]
    assert scored_bytes(setup) - REPORT_BYTES == pytest.approx(sum(taken), rel=0.05)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_disk_is_what_the_run_takes(
    kind: str, schedule: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"schedule": schedule, "lora_rank": 16 if kind == "lora" else 0}
    expected = needs(of(settings, keep_checkpoints=1)).disk
    folder, most = Path(settings["output_dir"]), []
    rotate, finish = checkpoint.rotate, checkpoint.finish
    for name, function in (("rotate", rotate), ("finish", finish)):

        def look(*arguments: Any, then: Any = function) -> None:
            most.append(folder_bytes(folder))
            then(*arguments)

        monkeypatch.setattr(run, name, look)
    run.train(TrainConfig(**settings, keep_checkpoints=1))
    assert expected.peak == pytest.approx(max(most), rel=0.05)
    assert expected.end == pytest.approx(folder_bytes(folder), rel=0.05)


def test_what_does_not_fit_says_what_would(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    settings |= {"max_completion_tokens": 300}
    first = of(settings)
    assert len(budget_lines(first)) == 2
    needed = needs(first).memory.needed
    monkeypatch.setattr(budgets, "memory_room", lambda _: Room(2**40, needed - 1))
    made = of(settings)
    (remedy,) = made.remedies
    assert remedy.settings == {"max_tokens_per_pass": 1024}
    assert remedy.needed < needed
    assert needs(of(settings | remedy.settings)).memory.needed == remedy.needed
    assert budget_lines(made)[-1] == (
        f"note      that is more memory than is free; what would do: max_tokens_per_pass 1024 "
        f"({shown_size(remedy.needed)})"
    )
    check_memory(made)  # it may be free by then


def test_remedies_come_one_after_the_other(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "memory_room", lambda _: Room(2**40, 1))
    made = of(settings, max_tokens_per_pass=100, max_completion_tokens=300)
    assert [str(r) for r in made.remedies] == [
        "rollout_batch_size 8",
        "rollout_batch_size 8, gradient_checkpointing true",
        "rollout_batch_size 8, gradient_checkpointing true, lora_rank 16, learning_rate 0.03",
    ]
    assert made.remedy(1) is None, "none suffices"
    assert budget_lines(made)[-1] == (
        "note      that is more memory than is free; take a smaller model, or a machine with more "
        "memory"
    )
    needed = [r.needed for r in made.remedies]
    assert needed == sorted(needed, reverse=True)
    assert made.remedy(needed[1]) == made.remedies[1]


def test_what_no_memory_can_hold_is_an_error(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgets, "memory_room", lambda _: Room(10**6, 10**6))
    with pytest.raises(InputError, match=r"the run must fit the 1.0 MB of memory that there are"):
        run.train(TrainConfig(**settings))
    assert not (Path(settings["output_dir"]) / "config.yaml").exists()


def test_what_is_advised_fits_beside_the_process(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all the memory that there is, the process has some already."""
    monkeypatch.setattr(budgets, "memory_room", lambda _: Room(10**9, 1))
    made = of(settings, max_completion_tokens=300)
    memory = needs(made).memory
    process = memory.parts["process"]
    least = made.remedies[-1].needed
    heavy = memory._replace(phases={"optimizer": memory.peak + 10**9})
    for total, advice in ((process + least, "; set "), (process + least - 1, "; take a smaller")):
        room = Room(total, 1)
        with pytest.raises(InputError, match=advice):
            check_memory(made._replace(room=room, needs=needs(made)._replace(memory=heavy)))


def test_a_disk_that_is_too_full_is_said(settings: dict) -> None:
    made = of(settings)
    assert not any("disk has" in line for line in budget_lines(made))
    full = made._replace(free=needs(made).disk.peak - 1)
    assert budget_lines(full)[-1] == "note      that is more than the disk has"


def test_a_model_that_needs_numbers_is_said_and_trained(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stubborn(_: Any) -> None:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(budgets, "Models", stubborn)
    said: list[str] = []

    class Heard(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    run.train(TrainConfig(**settings | {"steps": 1}), progress=Heard())
    assert "memory    not known before the first step (RuntimeError: data-dependent)" in said


def test_the_room_is_the_machines() -> None:
    found = memory_room(torch.device("cpu"))
    assert found.total is not None
    assert found.available is not None
    assert 0 < found.available <= found.total
    assert 50e6 < resident_memory() < found.total


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize("version", [1, 2])
def test_a_jobs_memory_is_that_of_its_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """Also where the limit stands on a group around its own, as Slurm and systemd set them."""
    root = tmp_path / "cgroup"
    names = memory._NAMES[memory.CGROUPS / "memory" if version == 1 else memory.CGROUPS]
    top = root / "memory" if version == 1 else root
    job = top / "slurm" / "job_7"
    (job / "step_0").mkdir(parents=True)
    for name, text in zip(
        names, ("1000000", "400000", "inactive_file 100000\nanon 1"), strict=True
    ):
        (job / name).write_text(text)
    kind = "4:memory" if version == 1 else "0:"
    (tmp_path / "own").write_text(f"1:cpu:/other\n{kind}:/slurm/job_7/step_0\n")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    other = {root / k.relative_to(memory.CGROUPS): v for k, v in memory._NAMES.items()}
    monkeypatch.setattr(memory, "_NAMES", other)
    monkeypatch.setattr(memory, "CGROUPS", root)
    assert memory_room(torch.device("cpu")) == (1_000_000, 700_000)
