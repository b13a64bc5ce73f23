"""Checkpoints: complete or absent, never half written; everything a run needs to continue.

The newest one holds the optimizer's state, the others (the best on validation data, and
`keep_checkpoints` in all) the weights alone. A finished run keeps the newest if more steps may
follow, and nothing if not: what was chosen is in final/.
"""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.preflight.disk import Sizes, disk
from opcd.runtime.files import (
    folder_bytes,
    free_bytes,
    remove_folder,
    shown_size,
    write_folder,
)
from opcd.runtime.untrusted import OPTIMIZER
from opcd.tasks.prepare import Setup
from opcd.training.loop import Distiller
from opcd.training.model_writer import ModelWriter

STATE_FILE = OPTIMIZER
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_DAMAGED = (SafetensorError, pickle.UnpicklingError)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(f for f in folder.glob("step-*") if f.name.removeprefix("step-").isdecimal())


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:06d}"


def save_checkpoint(
    folder: Path, distiller: Distiller, writer: ModelWriter, extra: dict[str, Any]
) -> Path:
    """Save model, optimizer, number of steps and `extra` as ``folder/step-NNNNNN``.

    A trained model is one that loads by itself, with weights in float32; an adapter is in peft's
    layout. Learning rate, data position and what is sampled are functions of the number of steps.

    Raises InputError if it cannot be written; the checkpoints before it are as they were.
    """
    target = checkpoint_of(folder, distiller.steps_done)

    def write(aside: Path) -> None:
        _save_student(distiller.student, writer, aside)
        state = {
            "steps_done": distiller.steps_done,
            "optimizer": distiller.optimizer.state_dict(),
            **extra,
        }
        torch.save(state, aside / STATE_FILE)

    try:
        write_folder(target, write)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk comes as any of them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        kept = list_checkpoints(folder)
        left = f"{kept[-1].name} is kept" if kept else "no checkpoint is there yet"
        needed, free = _sizes(distiller, writer).whole, free_bytes(folder.parent)
        raise InputError(
            f"{target} must be written, got {reason}; it needs about {shown_size(needed)}, and "
            f"{shown_size(free)} are free; make room and resume the run ({left})"
        ) from error
    return target


def load_checkpoint(checkpoint: Path, distiller: Distiller) -> dict[str, Any]:
    """Put a distiller where `save_checkpoint` left it; returns the saved state."""
    if not (checkpoint / STATE_FILE).exists():
        raise InputError(
            f"{checkpoint} must hold the optimizer's state to be continued, but holds weights "
            f"alone, as all but the newest do; restore the newest, or start another output_dir"
        )
    try:
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        _load_student(distiller.student, checkpoint)
        distiller.optimizer.load_state_dict(state["optimizer"])
    except (OSError, RuntimeError, LookupError, EOFError, ValueError, *_DAMAGED) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{checkpoint} must hold a checkpoint of this run, got {reason}; restore it from a "
            f"copy, or start another output_dir"
        ) from error
    distiller.weights_changed()
    distiller.steps_done = state["steps_done"]
    return state


def rotate(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, the optimizer's state of all
    but the newest, and what a kill left."""
    _clear_leftovers(folder)
    *older, _ = found = list_checkpoints(folder)
    best = None if best_step is None else checkpoint_of(folder, best_step)
    for old in older:
        if old in found[-keep:] or old == best:
            (old / STATE_FILE).unlink(missing_ok=True)
        else:
            remove_folder(old)


def finish(folder: Path, config: TrainConfig, steps_done: int) -> None:
    """Keep what a finished run needs: the newest checkpoint where steps may still be added."""
    _clear_leftovers(folder)
    found = list_checkpoints(folder)
    goes_on = config.schedule == "constant" or steps_done < config.steps
    for checkpoint in found[:-1] if goes_on else found:
        remove_folder(checkpoint)


def check_room(folder: Path, distiller: Distiller, writer: ModelWriter, setup: Setup) -> None:
    """Raise InputError if checkpoints and model of a run will not fit on the disk of `folder`."""
    needed = disk(_sizes(distiller, writer), setup).peak
    room = free_bytes(folder) + folder_bytes(folder / "checkpoints")
    if needed > room:
        raise InputError(
            f"output_dir must have room for the run's checkpoints, about {shown_size(needed)}, got "
            f"{shown_size(room)} free in {str(folder)!r}; choose another output_dir, lower "
            f"keep_checkpoints, or train an adapter with lora_rank"
        )


def _clear_leftovers(folder: Path) -> None:
    for leftover in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
        shutil.rmtree(leftover)


def _sizes(distiller: Distiller, writer: ModelWriter) -> Sizes:
    return Sizes.of(writer.base, distiller.parameters, isinstance(distiller.student, PeftModel))


def _save_student(student: Any, writer: ModelWriter, folder: Path) -> None:
    if isinstance(student, PeftModel):
        student.peft_config["default"].save_pretrained(folder)
        save_file(
            get_peft_model_state_dict(student, save_embedding_layers=False),
            folder / ADAPTER_WEIGHTS,
        )
    else:
        writer.write(folder, writer.base.names_for(student).get, as_stored=False)


def _load_student(student: torch.nn.Module, folder: Path) -> None:
    if isinstance(student, PeftModel):
        set_peft_model_state_dict(student, load_file(folder / ADAPTER_WEIGHTS))
        return
    saved = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    student.load_state_dict(saved.state_dict())
