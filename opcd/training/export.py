"""The chosen checkpoint as a model of its own."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from opcd.models.by_name import load_config, load_model
from opcd.runtime.files import write_folder, write_json
from opcd.tasks.prepare import Setup
from opcd.training.checkpoint import checkpoint_of

SELECTION_FILE = "selection.json"


def export(setup: Setup, folder: Path, best: dict[str, Any]) -> None:
    """Write the chosen checkpoint as final/, in the precision the model was stored in.

    A run that was finished before and goes on keeps its final/ where that is still the best.
    """
    config, final = setup.config, folder / "final"
    step = best["step"] or config.steps
    checkpoint = checkpoint_of(folder / "checkpoints", step)
    selection = {
        "how": _how(best, step, config.steps),
        "step": step,
        "steps_done": config.steps,
        "fingerprint": setup.fingerprint,
        "selection_fingerprint": setup.selection_fingerprint,
        "data": config.validation_data,
        "validation": best,
    }
    if not checkpoint.exists():
        assert read_selection(folder)["step"] == step, (
            "neither a checkpoint nor the model of before"
        )
        write_json(final / SELECTION_FILE, selection)
        return
    stored = stored_dtype(config.model)
    if config.lora_rank > 0:
        base = load_model(config.model, stored)
        adapter = PeftModel.from_pretrained(base, str(checkpoint))
        model: PreTrainedModel = adapter.merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=stored)

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        setup.tokenizer.save_pretrained(aside)
        write_json(aside / SELECTION_FILE, selection)

    write_folder(final, write)


def stored_dtype(name: str) -> torch.dtype:
    """What a model's weights are stored in."""
    found: torch.dtype | None = getattr(load_config(name), "dtype", None)
    return found or torch.float32


def read_selection(folder: Path) -> dict[str, Any]:
    """How the model in final/ of a run was chosen; {} where there is none."""
    file = folder / "final" / SELECTION_FILE
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


def _how(best: dict[str, Any], step: int, steps: int) -> str:
    if best["step"] is None:
        return f"step {step}, the last (no validation data)"
    return (
        f"step {step} of {steps}, chosen on validation data by accuracy "
        f"({best['accuracy']:.1%}), then divergence"
    )
