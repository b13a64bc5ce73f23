"""The chosen checkpoint as a model of its own."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from opcd.models.by_name import load_config, load_model
from opcd.runtime.files import write_folder, write_json
from opcd.tasks.prepare import Setup
from opcd.training.checkpoint import list_checkpoints

SELECTION_FILE = "selection.json"


def export(setup: Setup, folder: Path, best: dict[str, Any]) -> None:
    """Write the chosen checkpoint as final/, in the precision the model was stored in."""
    config = setup.config
    newest = list_checkpoints(folder / "checkpoints")[-1]
    step = best["step"] or int(newest.name.removeprefix("step-"))
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    stored = getattr(load_config(config.model), "dtype", None) or torch.float32
    if config.lora_rank > 0:
        base = load_model(config.model, stored)
        adapter = PeftModel.from_pretrained(base, str(checkpoint))
        model: PreTrainedModel = adapter.merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=stored)
    selection = {
        "how": _how(best, step, config.steps),
        "step": step,
        "data": config.validation_data,
        "validation": best,
    }

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        setup.tokenizer.save_pretrained(aside)
        write_json(aside / SELECTION_FILE, selection)

    write_folder(folder / "final", write)


def _how(best: dict[str, Any], step: int, steps: int) -> str:
    if best["step"] is None:
        return f"step {step}, the last (no validation data)"
    return (
        f"step {step} of {steps}, chosen on validation data by accuracy "
        f"({best['accuracy']:.1%}), then divergence"
    )
