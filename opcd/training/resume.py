"""Which runs may be begun or continued in a folder, and with what settings."""

import json
from pathlib import Path
from typing import Any

from opcd.config import TrainConfig
from opcd.config.settings import gather, written_here
from opcd.errors import InputError
from opcd.models.digest import local_folder, model_digest
from opcd.runtime.files import make_folder
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup
from opcd.training.checkpoint import list_checkpoints

CHANGES_FILE = "changes.jsonl"
# Fields that may change when a run is continued; those of the second kind alter the steps to come,
# for a run whose loss was not finite.
HOUSEKEEPING = {
    *("save_every", "keep_checkpoints", "output_dir", "max_minutes", "trackers", "on_alarm"),
    "without_texts",
}
REMEDIES = {"learning_rate", "max_grad_norm", "dtype"}


def check_folder(config: TrainConfig, resume: bool, progress: Progress) -> Path:
    """The run's folder, if it may be used. A folder without a checkpoint holds no run yet."""
    folder = Path(config.output_dir)
    saved = folder / "config.yaml"
    if not resume:
        if list_checkpoints(folder / "checkpoints") or (folder / "final").exists():
            raise InputError(
                f"output_dir must not hold a run yet, got {str(folder)!r} with one; resume it, or "
                f"choose another output_dir"
            )
        if saved.exists() and not written_here(saved):
            raise InputError(
                f"output_dir must not hold a config.yaml of yours, which the run's own would "
                f"replace, got {str(folder)!r}; choose another output_dir"
            )
        return make_folder(folder)
    if not saved.is_file():
        raise InputError(
            f"to resume there must be a run, got no {saved}; start one without resume, or name its "
            f"output_dir if it was moved"
        )
    before = gather({}, saved)
    changed = set(before.differing_fields(config)) - HOUSEKEEPING
    if kept := changed - REMEDIES - {"steps"}:
        raise InputError(
            f"a resumed run must keep its settings, got other values for "
            f"{', '.join(sorted(kept))}; take them from {saved}, or start another output_dir"
        )
    _check_steps(before, config.steps)
    for name in sorted(changed):
        progress.say(f"continuing with {name} {getattr(config, name)}, was {getattr(before, name)}")
    if changed:
        record_change(
            folder, {name: [getattr(before, name), getattr(config, name)] for name in changed}
        )
    return folder


def record_change(folder: Path, changed: dict[str, Any]) -> None:
    """Keep which settings are others behind which step: config.yaml holds the newest alone."""
    kept = list_checkpoints(folder / "checkpoints")
    after = kept[-1].name.removeprefix("step-").lstrip("0") if kept else ""
    with (folder / CHANGES_FILE).open("a", encoding="utf-8") as file:
        print(json.dumps({"after_step": int(after or 0), "changed": changed}), file=file)


def _check_steps(before: TrainConfig, steps: int) -> None:
    """Raise InputError if a run cannot be given this number of steps."""
    if steps != before.steps and before.schedule == "linear":
        raise InputError(
            f"a run with the schedule linear must keep its steps, got {steps} and {before.steps} "
            f"before: they set the learning rate of every step, which has ended near 0; set "
            f"steps to {before.steps}, or start another output_dir"
        )
    if steps < before.steps:
        raise InputError(
            f"a resumed run can be prolonged and not shortened, got {steps} steps and "
            f"{before.steps} before; set steps to {before.steps}, or start another output_dir"
        )


def model_identities(config: TrainConfig) -> dict[str, str]:
    """What tells the models of a run from others of the same names."""
    found = {}
    for name in {config.model, config.teacher or config.model}:
        if (folder := local_folder(name)) is not None:
            found[name] = model_digest(str(folder))
    return found


def check_fingerprints(before: dict[str, Any], setup: Setup, where: Path) -> bool:
    """Whether checkpoints are judged as before: a user's scorer may have been mended since.

    Raises InputError if a run would go on with other data or models than it was started with.
    """
    known = before.get("models", {})
    for name, now in model_identities(setup.config).items():
        if known.get(name, now) != now:
            raise InputError(
                f"a resumed run must go on from the model it was started with, but {name!r} holds "
                f"other files than when {where} was written; restore them, or start another "
                f"output_dir"
            )
    if before["fingerprint"] != setup.fingerprint:
        raise InputError(
            f"a resumed run must see the prompts it was started with, but context, prompts, guided "
            f"completions or chat template give other token ids than in {where}; restore the files"
        )
    # Runs of before it was kept go on.
    judged = before.get("selection_fingerprint", setup.selection_fingerprint)
    if judged == setup.selection_fingerprint:
        return True
    mended = setup.task.scorer.source and before.get("validation_digest")
    if mended != setup.task.validation_digest:
        raise InputError(
            f"a resumed run must choose its checkpoint by the validation data it was started with, "
            f"but prompts, accepted answers or scorer are others than in {where}; restore "
            f"{setup.config.validation_data!r}, or start another output_dir"
        )
    return False
