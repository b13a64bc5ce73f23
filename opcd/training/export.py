"""The chosen checkpoint as a model of its own."""

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel

from opcd.errors import InputError
from opcd.evaluation.measured import measured_by
from opcd.models.by_name import ADAPTER_CONFIG, load_model
from opcd.models.files import ModelFiles
from opcd.runtime.environment import environment
from opcd.runtime.files import read_metrics, write_folder, write_json
from opcd.runtime.strict_json import parse_json
from opcd.tasks.prepare import Setup
from opcd.training.checkpoint import ADAPTER_WEIGHTS, checkpoint_of
from opcd.training.model_writer import ModelWriter
from opcd.training.resume import model_identities

SELECTION_FILE = "selection.json"


def export(
    setup: Setup, writer: ModelWriter, folder: Path, best: dict[str, Any], steps_done: int
) -> None:
    """Write the chosen checkpoint as final/, and how it was chosen.

    A run that was finished before and goes on keeps its final/ where that is still the best.
    """
    config, final = setup.config, folder / "final"
    step = best["step"] or steps_done
    checkpoint = checkpoint_of(folder / "checkpoints", step)
    selection = {
        "how": _how(best, step, steps_done, folder / "metrics.jsonl"),
        "step": step,
        "steps_done": steps_done,
        "fingerprint": setup.fingerprint,
        "measured_by": measured_by(setup),
        "selection_fingerprint": setup.selection_fingerprint,
        "trained_by": environment(setup.device),
        "models": model_identities(config),
        "data": config.validation_data,
        "validation": best,
    }
    if not checkpoint.exists():
        assert read_selection(folder)["step"] == step, (
            "neither a checkpoint nor the model of before"
        )
        write_json(final / SELECTION_FILE, selection)
        return

    def write(aside: Path) -> None:
        export_model(writer, checkpoint, aside)
        write_json(aside / SELECTION_FILE, selection)

    write_folder(final, write)


def export_model(writer: ModelWriter, checkpoint: Path, target: Path) -> None:
    """Write the model of a checkpoint into the folder `target`, as `writer.base` is stored.

    With weights as they were, every file and every tensor equals the base's. An adapter is merged
    as peft does it, and kept beside, in adapter/.
    Raises InputError for a checkpoint that does not hold all of the base's tensors.
    """
    base = writer.base
    if (checkpoint / ADAPTER_CONFIG).is_file():
        adapted = PeftModel.from_pretrained(load_model(base.name, base.dtype), str(checkpoint))
        writer.write(target, base.names_for(adapted.merge_and_unload()).get)
        _copy_adapter(checkpoint, target / "adapter", base.name)
        return
    trained = ModelFiles(str(checkpoint))
    lacking = sorted(base.slots.keys() - trained.slots.keys())
    if lacking:
        raise InputError(
            f"{checkpoint} must hold every tensor of {base.name!r}, but lacks {len(lacking)}, such "
            f"as {lacking[0]}; it was saved by another version: start another output_dir"
        )
    writer.write(target, trained.read)


def read_selection(folder: Path) -> dict[str, Any]:
    """How the model in final/ of a run was chosen; {} where there is none.

    Raises InputError for a file that is no JSON object.
    """
    file = folder / "final" / SELECTION_FILE
    if not file.is_file():
        return {}
    try:
        found = parse_json(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} must say how the model was chosen, got {error}; restore it, or name the model "
            f"with --distilled"
        ) from error
    return found if isinstance(found, dict) else {}


def _copy_adapter(checkpoint: Path, target: Path, base: str) -> None:
    """An adapter for PeftModel.from_pretrained on `base`."""
    target.mkdir()
    settings = parse_json((checkpoint / ADAPTER_CONFIG).read_text("utf-8"))
    settings |= {"base_model_name_or_path": base, "inference_mode": True}
    write_json(target / ADAPTER_CONFIG, settings)
    shutil.copyfile(checkpoint / ADAPTER_WEIGHTS, target / ADAPTER_WEIGHTS)


def _how(best: dict[str, Any], step: int, steps: int, metrics: Path) -> str:
    if best["step"] is None:
        return f"step {step}, the last (no validation data)"
    judged = "accuracy" in best
    if judged:
        reached = f"accuracy {best['accuracy']:.1%}"
    else:
        near = best["missed_kl"] if "missed_kl" in best else best["gap"]
        reached = f"{near:.3f} nats from the prompted model on its answers"
    if sum("validation" in row for row in read_metrics(metrics) if row["step"]) == 1:
        return f"step {step} of {steps}, the only one validated ({reached}): none was chosen"
    by = f"by {reached}, then the distance to the prompted model" if judged else f"as {reached}"
    return f"step {step} of {steps}, chosen on validation data {by}"
