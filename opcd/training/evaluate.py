"""A run's model, or another one, scored on test data."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opcd.config import TrainConfig
from opcd.config.settings import gather
from opcd.errors import InputError
from opcd.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from opcd.evaluation.measured import OF_THE_FORM, measured_by, other_fields
from opcd.evaluation.named import named_contenders
from opcd.models.by_name import resolve_model
from opcd.runtime.files import free_name, make_folder, shown
from opcd.runtime.progress import Progress
from opcd.runtime.untrusted import check_run_folder
from opcd.tasks.prepare import Setup, prepare
from opcd.training.export import SELECTION_FILE, read_selection


def evaluate_run(
    config: TrainConfig,
    distilled: str | None = None,
    save_to: str | None = None,
    progress: Progress | None = None,
    contenders: Mapping[str, str] = MappingProxyType({}),  # who else answers, by name
    served_model: str | None = None,
) -> tuple[Path, Evaluation]:
    """Score `distilled` (default: the run's final model; "none": only base and prompted).

    `contenders` and `served_model` are those of `named_contenders`. Returns the folder that was
    written to, and the scorecard.
    """
    progress = progress or Progress()
    run = Path(config.output_dir)
    path = str(run / "final") if distilled is None else distilled
    if (there := Path(path).expanduser()).is_dir():
        path = str(there)
    if distilled is None and not Path(path).is_dir():
        raise InputError(
            f"there must be a distilled model, got no folder {path!r}; run `opcd train` first, "
            f"pass --output_dir if the run was moved, "
            f"name one with --distilled, or pass --distilled none to measure base and prompted only"
        )
    if distilled is None:
        check_run_folder(run)
    if path != "none" and not Path(path).is_dir():
        resolve_model(path, "distilled")
    saved = gather({}, run / "config.yaml") if distilled is None else config
    setup = prepare(_without_lost_prompts(saved.measured_as(config), saved, progress))
    if not setup.task.test:
        raise InputError("there must be test data, got none; name a file as test_data")
    others = named_contenders(contenders, setup, served_model)
    config = setup.config
    data = Path(config.test_data).stem if config.test_data else "held-out"
    selection: dict[str, Any] | None = None
    changed = ""
    of = "-".join([re.sub(r"[\\/:]", "-", path.strip("/.")), *contenders, data])
    target = run / f"eval-{of}"
    if distilled is None:
        selection = read_selection(run) or None
        changed = _changed(selection or {}, setup, saved, run)
        target = run / f"eval-{'-'.join([*contenders, data])}" if changed or contenders else run
    elif distilled != "none":
        selection = {"how": f"{path}, as named"}
        changed = _other_form(path, setup)
    wanted = Path(save_to) if save_to else target
    own = target == run and wanted.resolve() == run.resolve()
    if not own and (wanted / "metrics.jsonl").is_file():
        raise InputError(
            f"save_to must not be the folder of a run, whose scorecard this one would replace, got "
            f"{save_to!r}; choose another"
        )
    target = make_folder(wanted if save_to or target == run else free_name(target))
    for line in [*setup.prompt_lines, *setup.notes]:
        progress.say(line)
    if changed:
        progress.say(f"note      {changed}")
    try:
        scored = None if path == "none" else path
        found = evaluate(setup, scored, progress, selection, others)
    except BaseException:
        with contextlib.suppress(OSError):
            target.rmdir()  # if nothing is in it
        raise
    write_evaluation(target, found, setup)
    return target, found


def _without_lost_prompts(
    config: TrainConfig, saved: TrainConfig, progress: Progress
) -> TrainConfig:
    """With the training prompts, which test requests must not be among, if they are there."""
    prompts = config.prompts or saved.prompts
    if prompts and not Path(prompts).is_file():
        progress.say(
            f"note      {shown(prompts)} is not there: whether test requests were trained on is "
            f"not checked"
        )
        prompts = None
    return replace(config, prompts=prompts)


def _other_form(path: str, setup: Setup) -> str:
    """For people: that a run's model, named by its folder, is not asked as it was trained."""
    if not (Path(path) / SELECTION_FILE).is_file():
        return ""
    kept = read_selection(Path(path).parent) if Path(path).name == "final" else {}
    before = kept.get("measured_by", {}).get("form")
    if before in (None, measured_by(setup)["form"]):
        return ""
    return (
        f"{path} was trained on prompts of another form: context or chat template put other "
        f"tokens around a request than in its run"
    )


def _changed(selection: dict[str, Any], setup: Setup, saved: TrainConfig, run: Path) -> str:
    """What is not as in training, for people; "" where everything is.

    Raises InputError if a run's model would be given prompts of another form, or be tested on
    prompts that may have been trained on.
    """
    before, now = selection.get("measured_by"), measured_by(setup)
    if before is None:
        return "not known to be as in training: what the run was measured by was not kept"
    if before["form"] != now["form"]:
        differing = saved.differing_fields(setup.config)
        named = ", ".join(name for name in differing if name in {*OF_THE_FORM, "model"})
        others = f"other values for {named}" if named else "other files"
        raise InputError(
            f"a run's model must be given prompts as it was trained on them, but context or chat "
            f"template put other tokens around a request than in training, with {others} than in "
            f"{run / 'config.yaml'}; restore them, or try the model on others with --distilled "
            f"{run / 'final'}"
        )
    requests = before.get("requests", now["requests"])
    if setup.config.test_data is None and requests != now["requests"]:
        raise InputError(
            f"without test_data a run is tested on the prompts that it kept out of training, but "
            f"prompts or held_out_share give others than in {run / 'config.yaml'}, which it may "
            f"have been trained on; restore them, or name a file as test_data"
        )
    changed = other_fields(before, now, saved, setup.config)
    return f"not as in training: {', '.join(changed)}" if changed else ""
