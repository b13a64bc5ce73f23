"""A run's models before and after, without and with the context, on its test data."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from opcd.config.settings import write_config
from opcd.errors import InputError
from opcd.evaluation.agreement import OwnSide, divergence_to, own_side
from opcd.evaluation.contenders import Answer, Contender, Models, both_contenders
from opcd.evaluation.measured import measured_by
from opcd.evaluation.report import write_report
from opcd.evaluation.scorecard import internalised, scorecard
from opcd.models.by_name import check_same_tokenizer, load_config, load_tokenizer
from opcd.runtime.files import read_metrics, write_json, write_jsonl
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup
from opcd.tasks.task import spread
from opcd.teacher import teacher_of

CONTENDERS = {"before": ("base", "prompted"), "after": ("distilled", "distilled_prompted")}


class Evaluation(NamedTuple):
    """A scorecard, and every answer that it was made from."""

    card: dict[str, Any]
    answers: list[dict[str, Any]]


def evaluate(
    setup: Setup,
    distilled: str | None,  # a name or a folder; None: only the model before
    progress: Progress,
    selection: dict[str, Any] | None = None,  # how the distilled model was chosen
) -> Evaluation:
    """Measure on the test requests, one model in memory at a time."""
    config, task = setup.config, setup.task
    names = {"before": config.model}
    if distilled is not None:
        _check_same_kind(setup, distilled)
        names["after"] = distilled
    held_out = [case.prompt for case in spread(task.test, config.divergence_prompts)]
    models = Models(setup)
    contenders: list[Contender] = []
    answers: dict[str, list[Answer]] = {}
    sides: dict[str, OwnSide] = {}
    progress.begin("evaluate", total=3 * len(names))
    try:
        for when in reversed(names):  # the model before comes last: most often it teaches
            pair = both_contenders(models, names[when], when, CONTENDERS[when])
            for contender in pair:
                answers[contender.name] = contender.answer(task.test)
                progress.part(contender.name)
            sides[when] = own_side(*models.get(names[when])[:3], held_out, config)
            progress.part(f"divergence {when}")
            contenders = pair + contenders
        teacher_model = models.get(config.teacher or config.model).model
        teacher = teacher_of(teacher_model, task.prefixes, config)
        divergence = {
            when: divergence_to(teacher, sides[when], config.temperature) if when in sides else None
            for when in CONTENDERS
        }
    finally:
        progress.end()
        models.close()
    columns, rows = scorecard(contenders, answers, task.test, task.scorer)
    gain = [columns[c]["accuracy"] for c in ("base", "prompted", "distilled") if c in columns]
    card = {
        "context": config.context,
        "model": config.model,
        "distilled": distilled,
        "teacher": config.teacher or config.model,
        "contenders": columns,
        "internalised": internalised(*gain) if distilled is not None else None,
        "divergence": divergence
        | {"unit": "nats per completion token, student || teacher", "prompts": len(held_out)},
        "prompt_tokens_saved": task.prompt_tokens_saved,
        "scorer": config.scorer,
        "decoding": {"temperature": 0.0, "max_completion_tokens": config.max_completion_tokens},
        "data": {"part": "test", "file": config.test_data},
        "measured_by": measured_by(setup),
    }
    if selection is not None:
        card["selection"] = selection
    return Evaluation(card, rows)


def read_scorecard(folder: Path) -> dict[str, Any] | None:
    """The scorecard in a folder; None where there is none that can be read."""
    try:
        return json.loads((folder / "scorecard.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def write_evaluation(folder: Path, found: Evaluation, setup: Setup) -> None:
    """scorecard.json, answers.jsonl and report.md with its curve; settings where no run's are.

    The scorecard comes last: where it is, the others are its own.
    """
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        write_config(setup.config, folder / "config.yaml")
    write_jsonl(folder / "answers.jsonl", found.answers)
    write_report(folder, found.card, found.answers, setup.config, metrics)
    write_json(folder / "scorecard.json", found.card)


def _check_same_kind(setup: Setup, distilled: str) -> None:
    base, folder = setup.config.model, Path(distilled)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(
            f"the distilled model must be whole, got an adapter alone in {distilled!r}; name a "
            f"run's final/, where it is merged"
        )
    ours, theirs = (load_config(name).get_text_config() for name in (base, distilled))
    for field in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
        before, after = getattr(ours, field, None), getattr(theirs, field, None)
        if before != after:
            raise InputError(
                f"the distilled model must be one of {base!r} with other weights, got {field} "
                f"{after} in {distilled!r} against {before}; name a model distilled from it"
            )
    if not folder.is_dir() or any(folder.glob("tokenizer*")):  # weights alone are read with ours
        check_same_tokenizer(setup.tokenizer, load_tokenizer(distilled), "distilled model and base")
