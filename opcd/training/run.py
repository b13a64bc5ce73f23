"""A run from its configuration to its scorecard: the folder, the steps, the proof."""

import contextlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from peft import PeftModel

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.agreement import divergence_to, own_side
from opcd.evaluation.contenders import Answer, greedy_answers
from opcd.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from opcd.evaluation.scorecard import accuracy
from opcd.models.adapter import lora_coverage
from opcd.models.files import ModelFiles
from opcd.runtime.files import free_name, make_folder, read_metrics, write_jsonl
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup, prepare
from opcd.tasks.task import spread
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
from opcd.training.loop import Distiller
from opcd.training.model_writer import ModelWriter

log = logging.getLogger(__name__)

# Fields that may change when a run is continued; those of the second kind alter the steps to come,
# for a run whose loss was not finite.
HOUSEKEEPING = {"save_every", "keep_checkpoints", "output_dir"}
REMEDIES = {"learning_rate", "max_grad_norm", "dtype"}


class Outcome(NamedTuple):
    """What has become of a run."""

    folder: Path
    steps_done: int
    stopped: str | None  # why it ended before it was exported; its checkpoint is saved
    evaluation: Evaluation | None  # where there is test data


def train(config: TrainConfig, resume: bool = False, progress: Progress | None = None) -> Outcome:
    """Distil, choose a checkpoint on validation data, export it, and score it on test data.

    Raises InputError for whatever a user gave that does not fit.
    """
    progress = progress or Progress()
    setup = prepare(config, for_training=True)
    folder = _check_folder(setup.config, resume, progress)
    config, before = setup.config, read_selection(folder)
    if before.get("steps_done") == config.steps:
        _check_fingerprints(before, setup, folder / "final")
        outcome = Outcome(folder, config.steps, None, None)
    else:
        outcome, best, writer = _fit(setup, folder, resume, progress)
        if outcome.stopped:
            return outcome
        export(setup, writer, folder, best)  # what was trained is out of memory by now
    finish(folder / "checkpoints", config)
    if not config.eval_data:
        return outcome
    found = evaluate(setup, str(folder / "final"), progress, read_selection(folder))
    write_evaluation(folder, found, setup)
    return outcome._replace(evaluation=found)


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
    if not config.eval_data:
        raise InputError("eval_data must name labelled test data, got none; pass --eval_data FILE")
    run = Path(config.output_dir)
    path = str(run / "final") if distilled is None else distilled
    if distilled is None and not Path(path).is_dir():
        raise InputError(
            f"there must be a distilled model, got no folder {path!r}; run `opcd train` first, "
            f"pass --output_dir if the run was moved, "
            f"name one with --distilled, or pass --distilled none to measure base and prompted only"
        )
    setup = prepare(config)
    data, config = Path(config.eval_data).stem, setup.config
    selection: dict[str, Any] | None = None
    changed: list[str] = []
    target = run / f"eval-{path.strip('/.').replace('/', '-')}-{data}"
    if distilled is None:
        selection = read_selection(run) or None
        changed = TrainConfig.load(run / "config.yaml").differing_fields(config)
        changed = [name for name in changed if name != "output_dir"]
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
    for line in [*setup.prompt_lines, *_notes(setup)]:
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


def _check_folder(config: TrainConfig, resume: bool, progress: Progress) -> Path:
    """The run's folder, if it may be used. A folder without a checkpoint holds no run yet."""
    folder = Path(config.output_dir)
    saved = folder / "config.yaml"
    if not resume:
        if list_checkpoints(folder / "checkpoints") or (folder / "final").exists():
            raise InputError(
                f"output_dir must not hold a run yet, got {str(folder)!r} with one; pass --resume "
                f"to continue it, or choose another output_dir"
            )
        return make_folder(folder)
    if not saved.is_file():
        raise InputError(
            f"--resume needs a run to continue, got no {saved}; leave --resume out to start one, "
            f"or pass --output_dir if the run was moved"
        )
    before = TrainConfig.load(saved)
    changed = set(before.differing_fields(config)) - HOUSEKEEPING
    if config.schedule == "constant" and config.steps > before.steps:
        changed.discard("steps")
    if changed - REMEDIES:
        raise InputError(
            f"a resumed run must keep its settings, got other values for "
            f"{', '.join(sorted(changed - REMEDIES))}; pass --config {saved}, or start another "
            f"output_dir"
        )
    for name in sorted(changed):
        progress.say(f"continuing with {name} {getattr(config, name)}, was {getattr(before, name)}")
    return folder


def _fit(
    setup: Setup, folder: Path, resume: bool, progress: Progress
) -> tuple[Outcome, dict[str, Any], ModelWriter]:
    """Train to the last step, unless `progress` ends it before.

    Also returns the best step on validation, and how the run writes models.
    """
    config, task, checkpoints = setup.config, setup.task, folder / "checkpoints"
    distiller = build_distiller(setup)
    template = setup.tokenizer.get_chat_template() if config.chat_template else None
    writer = ModelWriter(ModelFiles(config.model), distiller.student, template)
    best: dict[str, Any] = {"step": None}
    saved: set[int] = set()
    if resume and (done := list_checkpoints(checkpoints)):
        state = load_checkpoint(done[-1], distiller)
        best = state["best"]
        _check_fingerprints(state, setup, done[-1])
        saved.add(distiller.steps_done)
    elif resume and (folder / "final").exists():
        raise InputError(
            f"a run can be prolonged from its newest checkpoint, got none in {checkpoints}; "
            f"restore it, or start another output_dir"
        )
    config.save(folder / "config.yaml")
    check_room(folder, distiller, writer.base.nbytes)
    writer.rehearse(checkpoints)
    progress.say(_plan(setup, distiller))
    metrics_file = folder / "metrics.jsonl"
    write_jsonl(metrics_file, read_metrics(metrics_file, distiller.steps_done))
    extra = {
        "fingerprint": setup.fingerprint,
        "selection_fingerprint": setup.selection_fingerprint,
    }
    stopped: str | None = None
    progress.begin("distil", config.steps, distiller.steps_done)
    try:
        with metrics_file.open("a", encoding="utf-8") as metrics_log:
            while distiller.steps_done < config.steps and not stopped:
                try:
                    metrics = distiller.step()
                except InputError:
                    if distiller.steps_done not in saved:
                        save_checkpoint(checkpoints, distiller, writer, extra | {"best": best})
                    raise
                stopped = progress.stop()
                step, last = distiller.steps_done, distiller.steps_done == config.steps
                validated = task.validation and (step % config.validate_every == 0 or last)
                if validated:
                    metrics["validation"] = found = _validate(distiller, setup)
                    if best["step"] is None or _rank(found) > _rank(best):
                        best = {"step": step, **found}
                print(json.dumps(metrics), file=metrics_log, flush=True)
                if validated or last or stopped or step % config.save_every == 0:
                    save_checkpoint(checkpoints, distiller, writer, extra | {"best": best})
                    saved.add(step)
                    rotate(checkpoints, config.keep_checkpoints, best["step"])
                progress.part(_note(metrics, best), metrics)
    finally:
        progress.end()
        distiller.engine.close()
    return Outcome(folder, distiller.steps_done, stopped, None), best, writer


def _check_fingerprints(before: dict[str, Any], setup: Setup, where: Path) -> None:
    """Raise InputError if a run would go on with other data than it was started with."""
    if before["fingerprint"] != setup.fingerprint:
        raise InputError(
            f"a resumed run must see the prompts it was started with, but context, prompts, guided "
            f"completions or chat template give other token ids than in {where}; restore the files"
        )
    # Runs of before it was kept go on.
    judged = before.get("selection_fingerprint", setup.selection_fingerprint)
    if judged != setup.selection_fingerprint:
        raise InputError(
            f"a resumed run must choose its checkpoint by the validation data it was started with, "
            f"but prompts, accepted answers or scorer are others than in {where}; restore "
            f"{setup.config.validation_data!r}, or start another output_dir"
        )


def _validate(distiller: Distiller, setup: Setup) -> dict[str, float]:
    """Accuracy without the context, and divergence to the teacher, on the validation prompts."""
    config, task, student = setup.config, setup.task, distiller.student
    begin = time.perf_counter()
    distiller.engine.sync(student, distiller.steps_done)
    prompt_ids = [case.prompt.student_ids for case in task.validation]
    prompts = [case.prompt for case in spread(task.validation, config.divergence_prompts)]
    plan, engine = distiller.student_loss.plan, distiller.engine

    def measured() -> tuple[list[Answer], float]:
        answers = greedy_answers(engine, prompt_ids, setup)
        side = own_side(student, plan, engine, prompts, config)
        return answers, divergence_to(distiller.teacher, side, config.temperature)

    answers, divergence = distiller.in_low_precision(measured)
    return {
        "accuracy": accuracy(answers, task.validation, task.scorer),
        "divergence": divergence,
        "time_s": time.perf_counter() - begin,
    }


def _rank(found: dict[str, Any]) -> tuple[float, float]:
    return found["accuracy"], -found["divergence"]


def _plan(setup: Setup, distiller: Distiller) -> str:
    config, task = setup.config, setup.task
    contexts = [case.prompt.context for case in task.test] or [p.context for p in task.train]
    shared = fmean(len(task.prefixes[name]) for name in contexts)
    if shared < 0.8 * task.prompt_tokens_saved:
        log.warning(
            "only %.0f of about %.0f context tokens stand in front of all prompts: the chat "
            "template puts the rest elsewhere, and it is computed with every sequence",
            shared,
            task.prompt_tokens_saved,
        )
    trained = sum(p.numel() for p in distiller.parameters)
    kind = "every weight"
    if isinstance(distiller.student, PeftModel):
        kind = f"LoRA rank {config.lora_rank} on {lora_coverage(distiller.student)}"
    plan = distiller.teacher.plan
    often = "once" if plan.shares_prefix else "with every sequence"
    several = f"{len(task.prefixes)} of about " if len(task.prefixes) > 1 else ""
    lines = [
        f"context   {several}{shared:.0f} tokens, computed {often}; sequences {plan.mode}, "
        f"{plan.backend} ({plan.reason})",
        *setup.prompt_lines,
        f"student   {config.model} on {config.device}, {config.dtype}, training {kind} "
        f"({trained / 1e6:.1f} M)",
        f"rollouts  {distiller.engine.name} engine, {config.rollout_batch_size} at once",
        f"data      {len(task.train)} training, {len(task.validation)} validation, "
        f"{len(task.test)} test prompts",
        *_notes(setup),
    ]
    return "\n".join(lines)


def _notes(setup: Setup) -> list[str]:
    return [f"note      {remark}" for remark in setup.remarks]


def _note(metrics: dict[str, Any], best: dict[str, Any]) -> str:
    found = {k: metrics.get(k) for k in ("divergence", "guided_loss")}
    losses = [f"{k.replace('_', ' ')} {x:.3f}" for k, x in found.items() if x is not None]
    text = (
        f"{', '.join(losses)}, {metrics['mean_completion_tokens']:.1f} tokens "
        f"each, {metrics['completion_tokens_per_s']:.0f} tokens/s"
    )
    return text + (f", best {best['accuracy']:.0%}" if best["step"] is not None else "")
