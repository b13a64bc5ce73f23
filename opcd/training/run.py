"""A run from its configuration to its scorecard: the folder, the steps, the proof."""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from opcd.config import TrainConfig
from opcd.config.settings import write_config
from opcd.errors import InputError
from opcd.evaluation.elsewhere_tasks import tasks_of
from opcd.evaluation.evaluate import Evaluation, evaluate, read_scorecard, write_evaluation
from opcd.evaluation.evidence import write_evidence
from opcd.evaluation.page import Record, write_page
from opcd.models.files import ModelFiles
from opcd.objective import Divergence, head_divergence
from opcd.runtime.alone import alone
from opcd.runtime.files import read_metrics, write_jsonl
from opcd.runtime.memory import release_memory
from opcd.runtime.progress import Progress
from opcd.runtime.trackers import close_all, log_all, open_trackers
from opcd.runtime.untrusted import check_run_folder
from opcd.tasks.prepare import Setup, prepare
from opcd.tasks.template import with_defaults
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
from opcd.training.resume import (
    check_fingerprints,
    check_folder,
    model_identities,
    record_change,
)
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
    with alone(folder, "run"):
        return _train(setup, folder, resume, progress, divergence, source)


def _train(
    setup: Setup,
    folder: Path,
    resume: bool,
    progress: Progress,
    divergence: Divergence,
    source: MakeSource | None,
) -> Outcome:
    """See `train`; in a folder that is its own."""
    config, before = setup.config, read_selection(folder)
    finished = before.get("steps_done") == config.steps
    if not finished:
        announce_prompts(setup, progress)
        announce_budget(setup, progress)
    if finished:
        check_fingerprints(before, setup, folder / "final")
        progress.end()  # there is no step that an interrupt could wait for
        outcome = Outcome(folder, config.steps, None, None)
    else:
        outcome, best, writer = _trained(setup, folder, resume, progress, divergence, source)
        if outcome.stopped:
            return outcome
        release_memory()  # nothing that was trained is needed from here on
        export(setup, writer, folder, best, outcome.steps_done)
    finish(folder / "checkpoints", config, outcome.steps_done)
    if finished and (_is_scored(folder) or not setup.task.test):
        more = "; more steps would prolong it" if config.schedule == "constant" else ""
        progress.say(f"this run was finished before: nothing is left to do{more}")
        return outcome
    write_config(config, folder / "config.yaml")
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


def _trained(
    setup: Setup, folder: Path, resume: bool, *given: Any
) -> tuple[Outcome, dict[str, Any], ModelWriter]:
    """Train; also returns the best step on validation, and how the run writes models. Nothing of
    the training itself is held any longer."""
    training = _Training(setup, folder, *given)
    if resume:
        training.restore()
    stopped = training.run()
    outcome = Outcome(folder, training.distiller.steps_done, stopped, None)
    return outcome, training.best, training.writer


class _Training:
    """A run's steps, what is kept of them, and which is the best so far."""

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        progress: Progress,
        divergence: Divergence,
        source: MakeSource | None,
    ) -> None:
        self._setup, self._config = setup, setup.config
        self._folder, self._progress = folder, progress
        self._checkpoints = folder / "checkpoints"
        self._trackers = open_trackers(self._config.trackers, folder)
        self.distiller = build_distiller(setup, divergence, source)
        template, arguments = None, self._config.chat_template_args
        if self._config.chat_template or arguments:
            template = with_defaults(setup.tokenizer.get_chat_template(), arguments)
        files = ModelFiles(self._config.model)
        self.writer = ModelWriter(files, self.distiller.student, template)
        self.best: dict[str, Any] = {"step": None}
        self._saved: set[int] = set()  # steps with a checkpoint
        self._models = model_identities(self._config)
        self._metrics = folder / "metrics.jsonl"
        self._kept: list[dict[str, Any]] = []  # its rows before this process

    def restore(self) -> None:
        """Go on where the newest checkpoint is, if there is one."""
        done = list_checkpoints(self._checkpoints)
        if done:
            state = load_checkpoint(done[-1], self.distiller)
            same = check_fingerprints(state, self._setup, done[-1])
            self.best = state["best"] if same else self.best
            if not same:
                now = self._setup.task.scorer.identity
                record_change(self._folder, {"scorer": [state["scorer"], now]})
                self._progress.say(
                    "continuing with another text of the scorer: the checkpoint is chosen from "
                    "those to come"
                )
            self._saved.add(self.distiller.steps_done)
            self._kept = read_metrics(self._metrics, self.distiller.steps_done)
        elif (self._folder / "final").exists():
            raise InputError(
                f"a run can be prolonged from its newest checkpoint, got none in "
                f"{self._checkpoints}; restore it, or start another output_dir"
            )

    def run(self) -> str | None:
        """Train to the last step; returns why it was stopped before, if it was."""
        config, progress = self._config, self._progress
        write_config(config, self._folder / "config.yaml")
        check_room(self._folder, self.distiller, self.writer, self._setup)
        self.writer.rehearse(self._checkpoints)
        progress.say(run_plan(self._setup, self.distiller))
        write_jsonl(self._metrics, self._kept)
        alarms = Alarms.from_rows(config, self._kept)
        progress.begin("distil", config.steps, self.distiller.steps_done)
        try:
            with self._metrics.open("a", encoding="utf-8") as log:
                return self._steps(alarms, log)
        finally:
            progress.end()
            close_all(self._trackers)
            self.distiller.engine.close()

    def _steps(self, alarms: Alarms, log: TextIO) -> str | None:
        config, progress, distiller = self._config, self._progress, self.distiller
        validation = Validation(distiller, self._setup) if self._setup.task.validation else None
        stopped: str | None = None
        last = distiller.steps_done >= config.steps
        deadline = time.monotonic() + 60 * (config.max_minutes or math.inf)
        if validation and not distiller.steps_done and not self._kept:
            before: dict[str, Any] = {"step": 0, "validation": validation.measure()}
            progress.say(f"before    {validation_note(before['validation'])}")
            stopped = _raise_alarms(alarms, before, config, progress)
            print(json.dumps(before), file=log, flush=True)
            if stopped:
                self._save()
        while not (last or stopped):
            metrics = self._step()
            step = distiller.steps_done
            last = step == config.steps or time.monotonic() > deadline
            validated = validation and (step % config.validate_every == 0 or last)
            try:
                if validation and validated:
                    metrics["validation"] = self._validated(validation)
                alarmed = _raise_alarms(alarms, metrics, config, progress)
                progress.part(step_note(metrics, self.best), metrics)
                stopped = progress.stop() or alarmed
                if progress.enough() and not last:
                    last = True
                    if validation and not (validated or stopped):  # that model is chosen from, too
                        late = {"step": step, "validation": self._validated(validation)}
                        stopped = _raise_alarms(alarms, late, config, progress)
                        metrics |= late
                        progress.validated(metrics)
                        stopped = progress.stop() or stopped
            except Exception:  # of a callback, or of a user's scorer
                self._save()
                raise
            finally:
                print(json.dumps(metrics), file=log, flush=True)
                log_all(self._trackers, metrics)
            if validated or last or stopped or step % config.save_every == 0:
                self._save()
                rotate(self._checkpoints, config.keep_checkpoints, self.best["step"])
        return stopped

    def _step(self) -> dict[str, Any]:
        """The next step; the state before one that cannot be taken is kept."""
        try:
            return self.distiller.step()
        except InputError:
            if self.distiller.steps_done not in self._saved:
                self._save()
            raise

    def _validated(self, validation: Validation) -> dict[str, Any]:
        """The student as it is, measured, and kept as the best if it is that."""
        found, step = validation.measure(), self.distiller.steps_done
        if self.best["step"] is None or rank(found) > rank(self.best):
            self.best = {"step": step, **found}
        return found

    def _save(self) -> None:
        extra = {
            "fingerprint": self._setup.fingerprint,
            "selection_fingerprint": self._setup.selection_fingerprint,
            "validation_digest": self._setup.task.validation_digest,
            "scorer": self._setup.task.scorer.identity,
            "best": self.best,
            "models": self._models,
        }
        save_checkpoint(self._checkpoints, self.distiller, self.writer, extra)
        self._saved.add(self.distiller.steps_done)


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
