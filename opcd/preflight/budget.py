"""What a run needs, beside what the machine has, before weights are read."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from opcd.config.rate import LORA
from opcd.errors import InputError
from opcd.preflight.disk import Disk, disk
from opcd.preflight.memory import Memory, Models
from opcd.runtime.files import free_bytes, shown_size
from opcd.runtime.memory import Room, memory_room
from opcd.tasks.prepare import Setup

# What makes a run smaller, the least loss first; those of the first kind are never raised.
LOWERED = {"max_tokens_per_pass": 1024, "rollout_batch_size": 8}
CHANGES = {**LOWERED, "gradient_checkpointing": True, "lora_rank": 16}
NAMES = {
    "process": "beside them the process",
    "weights": "weights",
    "casts": "their casts",
    "teacher": "teacher",
    "gradients": "gradients",
    "adam": "Adam",
    "prefixes": "contexts",
    "activations": "activations",
    "loss": "loss",
    "rollouts": "sampling",
}
WORTH_NAMING = 0.02  # of the peak
NO_REMEDY = "take a smaller model, or a machine with more memory"


class Remedy(NamedTuple):
    """Settings with which a run needs less."""

    settings: dict[str, Any]
    needed: int  # bytes, beside what the process has already

    def __str__(self) -> str:
        return ", ".join(f"{name} {_written(value)}" for name, value in self.settings.items())


class Needs(NamedTuple):
    """What a run needs, in bytes."""

    memory: Memory
    disk: Disk


class Budget(NamedTuple):
    """What a run needs, and what there is of it, in bytes."""

    needs: Needs | str  # or why nobody knows: a model whose code does not run without numbers
    room: Room  # of the device's memory, beside this process
    free: int  # on the disk of output_dir
    remedies: list[Remedy]  # where the memory does not suffice: what was tried, the best one last

    def remedy(self, room: int | None) -> Remedy | None:
        """The first that fits in so many bytes; None where none does."""
        return next((r for r in self.remedies if room is not None and r.needed <= room), None)


def budget(setup: Setup) -> Budget:
    """What the training run that is set up needs, and where that is too much, what would do.

    Nothing is read but configurations, and no memory is taken; some seconds, as most of the run's
    operations are gone through once. Completions count with `max_completion_tokens`.
    """
    folder = Path(setup.config.output_dir).absolute()
    there = next(f for f in (folder, *folder.parents) if f.exists())
    room, free = memory_room(setup.device), free_bytes(there)
    try:
        needs = _needs(setup)
        fits = isinstance(needs, str) or _fits(needs.memory.needed, room)
        tried = [] if fits else _remedies(setup, room)
    except InputError:
        raise
    except Exception as error:  # whatever a model's code says to tensors without numbers
        reason = " ".join(str(error).split())[:200]
        return Budget(f"{type(error).__name__}: {reason}", room, free, [])
    return Budget(needs, room, free, tried)


def _needs(setup: Setup) -> Needs | str:
    if setup.config.source == "played":
        return "games grow by what they tell their players"
    models = Models(setup)
    return Needs(models.memory(), disk(models.sizes(), setup))


def _fits(needed: int, room: Room) -> bool:
    return room.available is None or needed <= room.available


def _remedies(setup: Setup, room: Room) -> list[Remedy]:
    """Changes one after the other, each behind those before it, until the memory suffices."""
    tried: list[Remedy] = []
    settings: dict[str, Any] = {}
    for name, value in CHANGES.items():
        current = getattr(setup.config, name)
        if current <= value if name in LOWERED else current:
            continue
        if name == "gradient_checkpointing" and setup.config.return_anchor:
            continue  # which it must go without
        settings = {**settings, name: value}
        if name == "lora_rank" and (rate := setup.config.learning_rate) is not None:
            # At the rate of all weights an adapter learns next to nothing.
            settings["learning_rate"] = float(f"{LORA * rate:.12g}")
        changed = setup._replace(config=replace(setup.config, **settings))
        tried.append(Remedy(settings, Models(changed).memory().needed))
        if _fits(tried[-1].needed, room):
            break
    return tried


def check_memory(made: Budget) -> None:
    """Raise InputError if the device cannot hold what the run has between its steps."""
    total, needs = made.room.total, made.needs
    if total is None or isinstance(needs, str) or needs.memory.phases["optimizer"] <= total:
        return
    remedy = made.remedy(total - needs.memory.parts["process"])
    advice = f"set {remedy}" if remedy else NO_REMEDY
    raise InputError(
        f"the run must fit the {shown_size(total)} of memory that there are, but needs "
        f"{shown_size(needs.memory.peak)}; {advice}"
    )


def budget_lines(made: Budget) -> list[str]:
    """What a run needs, for people."""
    if isinstance(made.needs, str):
        return [f"memory    not known before the first step ({made.needs})"]
    memory, disk_ = made.needs
    named = [
        f"{NAMES[part]} {nbytes / 1e9:.1f}"
        for part, nbytes in memory.parts.items()
        if nbytes >= WORTH_NAMING * memory.peak
    ]
    room = made.room.available
    free = "" if room is None else f" of {shown_size(room)} free"
    lines = [
        f"memory    about {shown_size(memory.needed)}{free} ({', '.join(named)})",
        f"disk      {shown_size(disk_.peak)} at most of {shown_size(made.free)}, "
        f"{shown_size(disk_.end)} at the end",
    ]
    if not _fits(memory.needed, made.room):
        remedy = made.remedy(room)
        do = f"what would do: {remedy} ({shown_size(remedy.needed)})" if remedy else NO_REMEDY
        lines.append(f"note      that is more memory than is free; {do}")
    if disk_.peak > made.free:
        lines.append("note      that is more than the disk has")
    return lines


def _written(value: float | bool) -> str:
    """As a command line takes it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"
