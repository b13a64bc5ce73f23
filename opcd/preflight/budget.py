"""What a run needs, beside what the machine has, before weights are read."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.preflight.disk import Disk, disk
from opcd.preflight.memory import Memory, Models
from opcd.runtime.files import free_bytes
from opcd.runtime.memory import Room, memory_room
from opcd.tasks.prepare import Setup

# What makes a run smaller, the least loss first; those of the first kind are never raised.
LOWERED = {"max_tokens_per_pass": 1024, "rollout_batch_size": 8}
CHANGES = {**LOWERED, "gradient_checkpointing": True, "lora_rank": 16}
NAMES = {
    "process": "the process itself",
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


class Remedy(NamedTuple):
    """Settings with which a run needs less."""

    settings: dict[str, Any]
    needed: int  # bytes, beside what the process has already


class Budget(NamedTuple):
    """What a run needs, in bytes, and what there is of it."""

    memory: Memory
    room: Room  # of the device's memory, beside this process
    disk: Disk
    free: int  # on the disk of output_dir
    remedies: list[Remedy]  # where the memory does not suffice, the least change first

    @property
    def fits(self) -> bool:
        """Whether the memory that is free now suffices, as far as it is known."""
        room = self.room.available
        return room is None or self.memory.needed <= room


def budget(setup: Setup) -> Budget:
    """What the training run that is set up needs, and where that is too much, what would do.

    Nothing is read but configurations, and no memory is taken; some seconds, as most of the run's
    operations are gone through once. Completions count with `max_completion_tokens`.
    """
    models = Models(setup)
    found, room = models.memory(), memory_room(setup.device)
    folder = Path(setup.config.output_dir)
    there = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    labelled = len(setup.task.validation), len(setup.task.test)
    taken = disk(models.sizes(), setup.config, *labelled)
    made = Budget(found, room, taken, free_bytes(there), [])
    return made if made.fits else made._replace(remedies=_remedies(setup, made))


def _remedies(setup: Setup, made: Budget) -> list[Remedy]:
    """Changes one after the other, each behind those before it, until the memory suffices."""
    tried: list[Remedy] = []
    settings: dict[str, Any] = {}
    for name, value in CHANGES.items():
        current = getattr(setup.config, name)
        if current == value or (name in LOWERED and current < value):
            continue
        settings = {**settings, name: value}
        changed = setup._replace(config=replace(setup.config, **settings))
        tried.append(Remedy(settings, Models(changed).memory().needed))
        if made.room.available is None or tried[-1].needed <= made.room.available:
            break
    return tried


def check_memory(made: Budget) -> None:
    """Raise InputError if a run needs more than the whole machine has."""
    total = made.room.total
    if total is None or made.memory.peak <= total:
        return
    last = made.remedies[-1] if made.remedies else None
    advice = "choose a smaller model, or a machine with more memory"
    if last is not None and last.needed <= total:
        pairs = ", ".join(f"{name} {value}" for name, value in last.settings.items())
        advice = f"{size(last.needed)} would do with {pairs}"
    raise InputError(
        f"the run must fit the memory of the device, {size(total)}, but needs "
        f"{size(made.memory.peak)}; {advice}"
    )


def budget_lines(made: Budget) -> list[str]:
    """What a run needs, for people."""
    memory, room = made.memory, made.room.available
    named = [
        f"{NAMES[part]} {nbytes / 1e9:.1f}"
        for part, nbytes in memory.parts.items()
        if nbytes >= WORTH_NAMING * memory.peak
    ]
    height = max(memory.phases, key=lambda phase: memory.phases[phase])
    free = "" if room is None else f", {size(room)} free"
    lines = [
        f"memory    {size(memory.needed)} at most{free} (in the {height}; {', '.join(named)})",
        f"disk      {size(made.disk.peak)} at most, {size(made.free)} free; "
        f"{size(made.disk.end)} at the end",
    ]
    if not made.fits:
        lines += [
            f"note      the memory that is free does not suffice; with "
            f"{', '.join(f'{name} {value}' for name, value in remedy.settings.items())} "
            f"{size(remedy.needed)}"
            for remedy in made.remedies[-1:]
        ]
    return lines


def size(nbytes: int) -> str:
    """For people."""
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
