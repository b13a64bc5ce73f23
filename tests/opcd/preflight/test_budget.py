"""What a run needs beside what there is."""

from pathlib import Path
from typing import Any

import pytest

import opcd.preflight.budget as room
from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.preflight.budget import Budget, budget, budget_lines, check_memory
from opcd.runtime.files import folder_bytes
from opcd.runtime.memory import Room, memory_room, resident_memory
from opcd.tasks.prepare import prepare
from opcd.training import checkpoint, run


def of(settings: dict, **overrides: Any) -> Budget:
    return budget(prepare(TrainConfig(**settings | overrides), for_training=True))


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_disk_is_what_the_run_takes(
    kind: str, schedule: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"schedule": schedule, "lora_rank": 16 if kind == "lora" else 0}
    expected = of(settings, keep_checkpoints=1).disk
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
    settings |= {"max_completion_tokens": 300, "gradient_checkpointing": False}
    needed = of(settings).memory.needed
    assert of(settings).fits
    monkeypatch.setattr(room, "memory_room", lambda _: Room(2**40, needed - 1))
    made = of(settings)
    assert not made.fits
    assert made.remedies[0].settings == {"max_tokens_per_pass": 1024}
    assert made.remedies[-1].needed < needed
    again = of(settings | made.remedies[-1].settings)
    assert again.memory.needed == pytest.approx(made.remedies[-1].needed, rel=0.01)
    note = budget_lines(made)[-1]
    assert note.startswith("note      the memory that is free does not suffice; with max_tokens")
    check_memory(made)  # it may be free by then


def test_what_no_memory_can_hold_is_an_error(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "memory_room", lambda _: Room(10**6, 10**6))
    with pytest.raises(InputError, match=r"the run must fit the memory of the device, 1.0 MB"):
        run.train(TrainConfig(**settings))
    assert not (Path(settings["output_dir"]) / "config.yaml").exists()


def test_lines_for_people(settings: dict) -> None:
    lines = budget_lines(of(settings))
    assert len(lines) == 2
    assert lines[0].startswith("memory    ")
    assert lines[1].startswith("disk      ")


def test_the_room_is_the_machines() -> None:
    found = memory_room(prepare.__globals__["torch"].device("cpu"))
    assert found.total is not None
    assert found.available is not None
    assert 0 < found.available <= found.total
    assert 50e6 < resident_memory() < found.total
