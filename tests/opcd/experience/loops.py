"""Loops that are run, ended and killed, and what is compared of them."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opcd.experience import folder, phases
from opcd.experience.gate import Decision
from opcd.experience.rounds import Outcome, learn
from opcd.experience.settings import read_settings
from opcd.runtime.progress import Progress


class Until(Progress):
    """Ends a distillation after a step."""

    def __init__(self, step: int = 0) -> None:
        self.left = step

    def part(self, note: str, metrics: dict | None = None) -> None:
        self.left -= 1

    def stop(self) -> str | None:
        return "the test" if self.left == 0 else None


def run(task: dict, resume: bool = False, stop_after: int = 0, **changed: object) -> Outcome:
    fields: dict[str, Any] = task | changed
    log = fields.pop("log", None)
    settings = read_settings(fields, None, log=log)
    said: list[str] = []
    return learn(settings, resume, said.append, lambda: contextlib.nullcontext(Until(stop_after)))


def keep_whatever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(phases, "decide", lambda *_: Decision(True, "as the test says"))
    real = phases.ranked

    def all_win(candidates: list, found: list, without: object, count: int) -> dict:
        ranking = real(candidates, found, without, count)
        return ranking | {"winners": [row["file"] for row in ranking["candidates"]][:count]}

    patch.setattr(phases, "ranked", all_win)


class Killed(BaseException):
    pass


def killed_again_and_again(task: dict, patch: pytest.MonkeyPatch) -> tuple[Outcome, int]:
    """A loop that is killed behind each phase, and ended after the first step of a distillation
    each time that it goes on; and how often that was."""
    real, left = folder.write_json, 0

    def dying(path: Path, value: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(path, value)

    patch.setattr(folder, "write_json", dying)
    for deaths in range(40):
        left = 2  # the settings, and one phase
        with contextlib.suppress(Killed):
            found = run(task, resume=deaths > 0, stop_after=1)
            if not found.stopped:
                return found, deaths
    raise AssertionError("the loop does not get on")


def assert_same(found: Outcome, whole: Outcome) -> None:
    """What a loop has left is what another one has, but for its folder."""
    for name in ("rounds.jsonl", "report.md", "round-1/attempts.json", "test/distilled.json"):
        ours, theirs = ((f.folder / name).read_text() for f in (found, whole))
        assert ours.replace(str(found.folder), str(whole.folder)) == theirs, name
    one, other = weights(found.folder), weights(whole.folder)
    assert all(torch.equal(one[name], other[name]) for name in other)


def weights(loop: Path, number: int = 1, what: str = "run") -> dict[str, torch.Tensor]:
    return load_file(loop / f"round-{number}" / what / "final" / "model.safetensors")
