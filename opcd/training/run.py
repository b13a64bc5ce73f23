"""A run from its configuration to its scorecard: the folder, the steps, the proof."""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from opcd.config import TrainConfig
from opcd.config.settings import write_config
from opcd.errors import InputError
from opcd.evaluation.elsewhere_tasks import tasks_of
from opcd.evaluation.evaluate import Evaluation, evaluate, read_scorecard, write_evaluation
from opcd.evaluation.evidence import write_evidence
from opcd.evaluation.page import Record, write_page
from opcd.models.files import ModelFiles
from opcd.objective import Divergence, head_divergence
from opcd.runtime.files import read_metrics, write_jsonl
from opcd.runtime.memory import release_memory
from opcd.runtime.progress import Progress
from opcd.runtime.trackers import log_all, open_trackers
from opcd.runtime.untrusted import check_run_folder
from opcd.tasks.prepare import Setup, prepare
from opcd.training.alarms import Alarms
from opcd.training.announce import (
    announce_budget,
    announce_prompts,
    run_plan,
    step_note,
    validation_note,
)
from opcd.training.build import build_distiller
from opcd.training.checkpoint import (
    check_room,
    finish,
    list_checkpoints,
    load_checkpoint,
    rotate,
    save_checkpoint,
)
from opcd.training.export import export, read_selection
from opcd.training.model_writer import ModelWriter
from opcd.training.resume import check_fingerprints, check_folder
from opcd.training.sources import MakeSource
from opcd.training.validation import Validation, rank


class Outcome(NamedTuple):
    """What has become of a run."""

    folder: Path
    steps_done: int
    stopped: str | None  # why it ended before it was exported; its checkpoint is saved
    evaluation: Evaluation | None  # where there is test data, and not scored before


def train(
    config: TrainConfig,
    resume: bool = False,
    progress: Progress | None = None,
    divergence: Divergence = head_divergence,
    source: MakeSource | None = None,
) -> Outcome:
    """Distil, choose a checkpoint on validation data, export it, and score it on test data.

    `divergence` is what the student loses, where another one is measured against the exact sum;
    `source` brings the episodes of steps where source is "played".
    Raises InputError for whatever a user gave that does not fit.
    """
    progress = progress or Progress()
    if resume and Path(config.output_dir).is_dir():
        check_run_folder(Path(config.output_dir))
    setup = prepare(config, for_training=True)
    tasks_of(config)  # what the scorecard will ask for must be there before the first step
    folder = check_folder(setup.config, resume, progress)
    config, before = setup.config, read_selection(folder)
    finished = before.get("steps_done") == config.steps
    if not finished:
        announce_prompts(setup, progress)
        announce_budget(setup, progress)
    if finished:
        check_fingerprints(before, setup, folder / "final")
        outcome = Outcome(folder, config.steps, None, None)
    else:
        outcome, best, writer = _fit(setup, folder, resume, progress, divergence, source)
        if outcome.stopped:
            return outcome
        release_memory()  # nothing that was trained is needed from here on
        export(setup, writer, folder, best, outcome.steps_done)
    finish(folder / "checkpoints", config, outcome.steps_done)
    if finished and (_is_scored(folder) or not setup.task.test):
        more = "; more steps would prolong it" if config.schedule == "constant" else ""
        progress.say(f"this run was finished before: nothing is left to do{more}")
        return outcome
    if not setup.task.test:
        evidence = write_evidence(folder, setup, None, str(folder / "final"))
        metrics = read_metrics(folder / "metrics.jsonl")
        write_page(folder, Record(setup.config, metrics, evidence, None, [], []))
        return outcome
    found = evaluate(setup, str(folder / "final"), progress, read_selection(folder))
    write_evaluation(folder, found, setup)
    return outcome._replace(evaluation=found)


def _is_scored(folder: Path) -> bool:
    """Whether a finished run's report is there, of the model in final/ and not of one before."""
    card = read_scorecard(folder) or {}
    return (folder / "report.md").is_file() and card.get("selection") == read_selection(folder)


def _fit(
    setup: Setup,
    folder: Path,
    resume: bool,
    progress: Progress,
    divergence: Divergence,
    source: MakeSource | None,
) -> tuple[Outcome, dict[str, Any], ModelWriter]:
    """Train to the last step, unless `progress` ends it before.

    Also returns the best step on validation, and how the run writes models.
    """
    config, task, checkpoints = setup.config, setup.task, folder / "checkpoints"
    trackers = open_trackers(config.trackers, folder)
    distiller = build_distiller(setup, divergence, source)
    template = setup.tokenizer.get_chat_template() if config.chat_template else None
    writer = ModelWriter(ModelFiles(config.model), distiller.student, template)
    best: dict[str, Any] = {"step": None}
    saved: set[int] = set()
    if resume and (done := list_checkpoints(checkpoints)):
        state = load_checkpoint(done[-1], distiller)
        best = state["best"]
        check_fingerprints(state, setup, done[-1])
        saved.add(distiller.steps_done)
    elif resume and (folder / "final").exists():
        raise InputError(
            f"a run can be prolonged from its newest checkpoint, got none in {checkpoints}; "
            f"restore it, or start another output_dir"
        )
    write_config(config, folder / "config.yaml")
    check_room(folder, distiller, writer, setup)
    writer.rehearse(checkpoints)
    progress.say(run_plan(setup, distiller))
    metrics_file = folder / "metrics.jsonl"
    kept = read_metrics(metrics_file, distiller.steps_done) if saved else []
    write_jsonl(metrics_file, kept)
    alarms = Alarms.from_rows(config, kept)
    extra = {
        "fingerprint": setup.fingerprint,
        "selection_fingerprint": setup.selection_fingerprint,
    }
    validation = Validation(distiller, setup) if task.validation else None
    stopped: str | None = None
    last = distiller.steps_done >= config.steps
    deadline = time.monotonic() + 60 * (config.max_minutes or math.inf)
    progress.begin("distil", config.steps, distiller.steps_done)
    try:
        with metrics_file.open("a", encoding="utf-8") as metrics_log:
            if validation and not distiller.steps_done and not kept:
                before: dict[str, Any] = {"step": 0, "validation": validation.measure()}
                progress.say(f"before    {validation_note(before['validation'])}")
                stopped = _raise_alarms(alarms, before, config, progress)
                print(json.dumps(before), file=metrics_log, flush=True)
                if stopped:
                    save_checkpoint(checkpoints, distiller, writer, extra | {"best": best})
            while not (last or stopped):
                try:
                    metrics = distiller.step()
                except InputError:
                    if distiller.steps_done not in saved:
                        save_checkpoint(checkpoints, distiller, writer, extra | {"best": best})
                    raise
                step = distiller.steps_done
                last = step == config.steps or time.monotonic() > deadline
                validated = validation and (step % config.validate_every == 0 or last)
                if validation and validated:
                    metrics["validation"] = found = validation.measure()
                    if best["step"] is None or rank(found) > rank(best):
                        best = {"step": step, **found}
                alarmed = _raise_alarms(alarms, metrics, config, progress)
                print(json.dumps(metrics), file=metrics_log, flush=True)
                log_all(trackers, metrics)
                try:
                    progress.part(step_note(metrics, best), metrics)
                except Exception:  # of a callback
                    save_checkpoint(checkpoints, distiller, writer, extra | {"best": best})
                    raise
                stopped = progress.stop() or alarmed
                last = last or progress.enough()
                if validated or last or stopped or step % config.save_every == 0:
                    save_checkpoint(checkpoints, distiller, writer, extra | {"best": best})
                    saved.add(step)
                    rotate(checkpoints, config.keep_checkpoints, best["step"])
    finally:
        progress.end()
        for tracker in trackers:
            tracker.close()
        distiller.engine.close()
    return Outcome(folder, distiller.steps_done, stopped, None), best, writer


def _raise_alarms(
    alarms: Alarms, metrics: dict[str, Any], config: TrainConfig, progress: Progress
) -> str | None:
    """Say the alarms of a row and keep them in it; returns why they end the run, if they do."""
    found = alarms.look(metrics)
    for alarm in found:
        progress.say(f"alarm     {alarm}")
    if not found:
        return None
    metrics["alarms"] = {alarm.name: str(alarm) for alarm in found}
    return f"alarm {', '.join(metrics['alarms'])}" if config.on_alarm == "stop" else None
