"""A run's model, or another one, scored on test data."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd.config import TrainConfig
from opcd.config.settings import gather
from opcd.errors import InputError
from opcd.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from opcd.runtime.files import free_name, make_folder
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup, prepare
from opcd.training.announce import notes
from opcd.training.export import read_selection


def evaluate_run(
    config: TrainConfig,
    distilled: str | None = None,
    save_to: str | None = None,
    progress: Progress | None = None,
) -> tuple[Path, Evaluation]:
    """Score `distilled` (default: the run's final model; "none": only base and prompted).

    Returns the folder that was written to, and the scorecard.
    """
    progress = progress or Progress()
    if not config.test_data:
        raise InputError("test_data must name labelled test data, got none; pass --test_data FILE")
    run = Path(config.output_dir)
    path = str(run / "final") if distilled is None else distilled
    if distilled is None and not Path(path).is_dir():
        raise InputError(
            f"there must be a distilled model, got no folder {path!r}; run `opcd train` first, "
            f"pass --output_dir if the run was moved, "
            f"name one with --distilled, or pass --distilled none to measure base and prompted only"
        )
    saved = gather({}, run / "config.yaml") if distilled is None else config
    setup = prepare(saved.measured_as(config))
    data, config = Path(config.test_data).stem, setup.config
    selection: dict[str, Any] | None = None
    changed: list[str] = []
    target = run / f"eval-{path.strip('/.').replace('/', '-')}-{data}"
    if distilled is None:
        selection = read_selection(run) or None
        changed = [name for name in saved.differing_fields(config) if name != "output_dir"]
        _check_same_prompts(selection or {}, setup, changed, run)
        target = run / f"eval-{data}" if changed else run
    elif distilled != "none":
        selection = {"how": f"{path}, as named"}
    wanted = Path(save_to) if save_to else target
    own = target == run and wanted.resolve() == run.resolve()
    if not own and (wanted / "metrics.jsonl").is_file():
        raise InputError(
            f"save_to must not be the folder of a run, whose scorecard this one would replace, got "
            f"{save_to!r}; choose another"
        )
    target = make_folder(wanted if save_to or target == run else free_name(target))
    for line in [*setup.prompt_lines, *notes(setup)]:
        progress.say(line)
    if changed:
        progress.say(f"note      not as in training: {', '.join(changed)}")
    try:
        found = evaluate(setup, None if path == "none" else path, progress, selection)
    except BaseException:
        with contextlib.suppress(OSError):
            target.rmdir()  # if nothing is in it
        raise
    write_evaluation(target, found, setup)
    return target, found


def _check_same_prompts(
    selection: dict[str, Any], setup: Setup, changed: Sequence[str], run: Path
) -> None:
    """Raise InputError if a run's model would be given other prompts than it was trained on."""
    trained_on = selection.get("prompts_digest")  # not kept by runs of before
    if trained_on in (None, setup.task.prompts_digest):
        return
    others = f"other values for {', '.join(changed)}" if changed else "other files"
    raise InputError(
        f"a run's model must be given prompts as it was trained on them, but context, training "
        f"prompts or chat template give other token ids than in training, with {others} than in "
        f"{run / 'config.yaml'}; restore them, or try the model on others with --distilled "
        f"{run / 'final'}"
    )
