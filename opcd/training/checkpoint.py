"""Checkpoints: complete or absent, never half written; everything a run needs to continue."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opcd.errors import InputError
from opcd.runtime.files import remove_folder, write_folder
from opcd.training.loop import Distiller

STATE_FILE = "trainer.pt"
_DAMAGED = (SafetensorError, pickle.UnpicklingError)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def save_checkpoint(folder: Path, distiller: Distiller, extra: dict[str, Any]) -> Path:
    """Save model, optimizer, number of steps and `extra` as ``folder/step-NNNNNN``.

    Learning rate, data position and what is sampled are functions of the number of steps.
    """
    target = folder / f"step-{distiller.steps_done:06d}"

    def write(aside: Path) -> None:
        _save_student(distiller.student, aside)
        state = {
            "steps_done": distiller.steps_done,
            "optimizer": distiller.optimizer.state_dict(),
            **extra,
        }
        torch.save(state, aside / STATE_FILE)

    write_folder(target, write)
    return target


def load_checkpoint(checkpoint: Path, distiller: Distiller) -> dict[str, Any]:
    """Put a distiller where `save_checkpoint` left it; returns the saved state."""
    try:
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        _load_student(distiller.student, checkpoint)
        distiller.optimizer.load_state_dict(state["optimizer"])
    except (OSError, RuntimeError, LookupError, EOFError, ValueError, *_DAMAGED) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{checkpoint} must hold a checkpoint of this run, got {reason}; "
            f"delete that folder to continue from the one before"
        ) from error
    distiller.weights_changed()
    distiller.steps_done = state["steps_done"]
    return state


def rotate(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one, and what a kill left."""
    for leftover in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
        shutil.rmtree(leftover)
    for old in list_checkpoints(folder)[:-keep]:
        if old.name != f"step-{best_step or 0:06d}":
            remove_folder(old)


def _save_student(student: Any, folder: Path) -> None:
    if isinstance(student, PeftModel):
        student.peft_config["default"].save_pretrained(folder)
        save_file(get_peft_model_state_dict(student), folder / "adapter_model.safetensors")
    else:
        student.save_pretrained(folder)


def _load_student(student: torch.nn.Module, folder: Path) -> None:
    if isinstance(student, PeftModel):
        set_peft_model_state_dict(student, load_file(folder / "adapter_model.safetensors"))
        return
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student.load_state_dict(saved.state_dict())
