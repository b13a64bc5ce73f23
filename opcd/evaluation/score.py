"""A run's scorecard: the models before and after, without and with the context."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.evaluation.agreement import OwnSide, divergence_to, own_side
from opcd.evaluation.contenders import Answer, Contender, Subjects
from opcd.evaluation.report import read_metrics, write_report
from opcd.evaluation.scorecard import internalised, scorecard
from opcd.models.by_name import load_config
from opcd.runtime.files import write_json, write_jsonl
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case, spread
from opcd.teacher import SharedPrefixTeacher


class Entrant(NamedTuple):
    """A model and the two rows that it makes."""

    when: str  # "before" or "after"
    model: str  # its name or folder
    alone: str
    prompted: str


class Scored(NamedTuple):
    """A scorecard, and every answer that it was made from."""

    card: dict[str, Any]
    answers: list[dict[str, Any]]


def score(
    setup: Setup,
    distilled: str | None,  # a name or a folder; None: only the model before
    progress: Progress,
    selection: dict[str, Any] | None = None,  # how the distilled model was chosen
) -> Scored:
    """Measure on the test requests, one model in memory at a time."""
    config, task = setup.config, setup.task
    entrants = [Entrant("before", config.model, "base", "prompted")]
    if distilled is not None:
        _check_same_kind(config.model, distilled)
        entrants.append(Entrant("after", distilled, "distilled", "distilled_prompted"))
    held_out = [case.prompt for case in spread(task.test, config.divergence_prompts)]
    subjects = Subjects(setup)
    contenders: list[Contender] = []
    answers: dict[str, list[Answer]] = {}
    sides: dict[str, OwnSide] = {}
    progress.begin("evaluate", total=3 * len(entrants))
    try:
        for entrant in reversed(entrants):  # the model before comes last: most often it teaches
            own = _contenders(entrant, subjects)
            for contender in own:
                answers[contender.name] = contender.answer(task.test)
                progress.part(contender.name)
            sides[entrant.when] = own_side(*subjects.get(entrant.model)[:3], held_out, config)
            progress.part(f"divergence {entrant.when}")
            contenders = own + contenders
        teacher = teacher_of(subjects.get(config.teacher or config.model).model, setup)
        divergence = {
            when: divergence_to(teacher, sides[when], config.temperature) if when in sides else None
            for when in ("before", "after")
        }
    finally:
        progress.end()
        subjects.close()
    columns, rows = scorecard(contenders, answers, task.test, task.scorer)
    gain = [columns[c]["accuracy"] for c in ("base", "prompted", "distilled") if c in columns]
    card = {
        "contenders": columns,
        "internalised": internalised(*gain) if distilled is not None else None,
        "divergence": divergence
        | {"unit": "nats per completion token, student || teacher", "prompts": len(held_out)},
        "prompt_tokens_saved": task.prompt_tokens_saved,
        "scorer": config.scorer,
        "decoding": {"temperature": 0.0, "max_completion_tokens": config.max_completion_tokens},
        "data": {"part": "test", "file": config.test_data},
    }
    if selection is not None:
        card["selection"] = selection
    return Scored(card, rows)


def teacher_of(model: Any, setup: Setup, **options: Any) -> SharedPrefixTeacher:
    """The teacher of a run on `model`."""
    config = setup.config
    return SharedPrefixTeacher(
        model,
        setup.task.prefixes,
        config.max_tokens_per_pass,
        prefix_cache_bytes=config.prefix_cache_mib * 2**20,
        **options,
    )


def write_scored(folder: Path, scored: Scored, setup: Setup) -> None:
    """scorecard.json, answers.jsonl and report.md with its curve."""
    metrics = read_metrics(folder / "metrics.jsonl")
    write_json(folder / "scorecard.json", scored.card)
    write_jsonl(folder / "answers.jsonl", scored.answers)
    write_report(folder, scored.card, scored.answers, setup.config, metrics)


def _contenders(entrant: Entrant, subjects: Subjects) -> list[Contender]:
    """Both rows of a model, which is loaded when it is asked."""

    def alone(cases: Sequence[Case]) -> list[Answer]:
        return subjects.get(entrant.model).alone(cases)

    def prompted(cases: Sequence[Case]) -> list[Answer]:
        return subjects.get(entrant.model).prompted(cases)

    return [
        Contender(entrant.alone, f"{entrant.when}, without the context", alone),
        Contender(entrant.prompted, f"{entrant.when}, with the context", prompted),
    ]


def _check_same_kind(base: str, distilled: str) -> None:
    folder = Path(distilled)
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
