"""A run's models before and after, without and with the context, on its test data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from opcd.config.settings import write_config
from opcd.errors import InputError
from opcd.evaluation.agreement import Divergences, Gap
from opcd.evaluation.constant import best_constant
from opcd.evaluation.contenders import Answer, Contender, Models
from opcd.evaluation.decoding import decoding_of
from opcd.evaluation.elsewhere_tasks import compared, tasks_of
from opcd.evaluation.evidence import write_evidence
from opcd.evaluation.intervals import paired_difference
from opcd.evaluation.leak import context_grams, leak, leak_rows
from opcd.evaluation.measured import measured_by
from opcd.evaluation.observed import AFTER, BEFORE, CONTENDERS, Observed, observe
from opcd.evaluation.page import Record, write_page
from opcd.evaluation.report import write_report
from opcd.evaluation.scorecard import (
    internalised,
    internalised_interval,
    more_right,
    scorecard,
)
from opcd.evaluation.table import write_table
from opcd.evaluation.verdict import reference_of, verdict
from opcd.models.adapter import check_adapter, is_adapter
from opcd.models.by_name import check_same_tokenizer, load_config, load_tokenizer
from opcd.runtime.files import read_metrics, write_json, write_jsonl
from opcd.runtime.progress import Progress
from opcd.runtime.strict_json import parse_json
from opcd.scoring.scorers import Scorer
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case


class Evaluation(NamedTuple):
    """A scorecard, and every answer that it was made from."""

    card: dict[str, Any]
    answers: list[dict[str, Any]]
    elsewhere: list[dict[str, Any]]  # both models' on requests that are not the context's
    test_sets: dict[str, list[dict[str, Any]]]  # answers to more sets, by their names
    leak: list[dict[str, Any]]  # answers to requests to reveal the context


def evaluate(
    setup: Setup,
    distilled: str | None,  # a name or a folder; None: only the model before
    progress: Progress,
    selection: dict[str, Any] | None = None,  # how the distilled model was chosen
    others: Callable[[Models], Sequence[Contender]] = lambda _: (),  # who answers beside them
) -> Evaluation:
    """Measure on the test requests, one model in memory at a time."""
    config = setup.config
    tasks_of(config)
    names = {BEFORE: config.model}
    if distilled is not None:
        _check_same_kind(setup, distilled)
        names[AFTER] = distilled
    seen = observe(setup, names, others, progress)
    card, rows = _of_test(setup, seen, distilled)
    more_rows = _add_sets(card, setup, seen)
    if selection is not None:
        card["selection"] = selection
    if seen.elsewhere is not None:
        card["elsewhere"] = seen.elsewhere.card
    if seen.tasks:
        card["elsewhere_tasks"] = compared(seen.tasks)
    if seen.told:
        card["leak"] = leak(context_grams(setup), seen.told, setup)
    if distilled is not None:
        card["verdict"] = verdict(card, config.shown_share)._asdict()
    asked = seen.elsewhere.answers if seen.elsewhere is not None else []
    return Evaluation(card, rows, asked, more_rows, leak_rows(seen.told))


def _of_test(
    setup: Setup, seen: Observed, distilled: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the test data say, and every answer to them."""
    config, task = setup.config, setup.task
    found, rows = reached(
        seen.contenders, seen.answers, seen.said, task.test, task.scorer, seen.gaps
    )
    for when, (alone, _) in CONTENDERS.items():
        if when in seen.apart:
            found["contenders"][alone] |= agreement_of(seen.gaps[when], seen.apart[when])
            _keep_nats(rows, seen, task.test, when)
    nats = {when: seen.apart[when].reverse_kl.mean for when in seen.apart}
    return {
        "context": config.context,
        "model": config.model,
        "distilled": distilled,
        "teacher": config.teacher or config.model,
        **found,
        "divergence": {
            **{when: nats.get(when) for when in CONTENDERS},
            "unit": "nats per completion token, student || teacher",
            "prompts": len(seen.held_out),
        },
        "prompt_tokens_saved": task.prompt_tokens_saved,
        "scorer": config.scorer if task.judges(task.test) else None,
        "decoding": decoding_of(setup),
        "data": {
            "part": "test" if config.test_data else "held out",
            "file": config.test_data or config.prompts,
        },
        "measured_by": measured_by(setup),
    }, rows


def _add_sets(
    card: dict[str, Any], setup: Setup, seen: Observed
) -> dict[str, list[dict[str, Any]]]:
    """Put what more sets say into the card; returns every answer to them."""
    task, rows = setup.task, {}
    begin = len(task.test)
    for name, cases in task.test_sets.items():
        here = slice(begin, begin := begin + len(cases))
        answers = {who: given[here] for who, given in seen.answers.items()}
        found, rows[name] = reached(seen.contenders, answers, seen.said[here], cases, task.scorer)
        card.setdefault("test_sets", {})[name] = {
            "file": setup.config.test_sets[name],
            **found,
        }
    return rows


def reached(
    contenders: Sequence[Contender],
    answers: Mapping[str, Sequence[Answer]],
    said: Sequence[Answer],
    cases: Sequence[Case],
    scorer: Scorer,
    gaps: Mapping[str, Gap] = MappingProxyType({}),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What contenders reached on one set of requests, for the scorecard, and every answer to it."""
    given = {who: own[: len(cases)] for who, own in answers.items()}
    columns, rows = scorecard(contenders, given, said[: len(cases)], cases, scorer)
    reference = reference_of(columns)
    gain = [columns[c].get("accuracy") for c in ("base", reference, "distilled") if c in columns]
    judged = None not in gain
    share = internalised(*gain) if judged and len(gain) == 3 else None
    found: dict[str, Any] = {"contenders": columns, "internalised": share}
    if share is not None:
        found["internalised_interval_95"] = internalised_interval(rows, reference)
    if judged:
        most = [
            x["commonest_answer"]["answer"] for x in columns.values() if "commonest_answer" in x
        ]
        texts = [answer.text for answer in said[: len(cases)]]
        constant = best_constant(cases, scorer, texts, most)
        found |= {"constant": constant._asdict()} if constant is not None else {}
    return found | {"differences": differences_of(rows, columns, gaps)}, rows


def differences_of(
    rows: Sequence[dict[str, Any]], columns: dict[str, Any], gaps: Mapping[str, Gap]
) -> dict[str, Any]:
    """What was gained and lost, request by request: accuracy, and nats a token of the gap."""
    found = {}
    reference = reference_of(columns)
    pairs = {"gain": (reference, "base"), "learned": ("distilled", "base")}
    for name, (one, other) in {**pairs, "left": ("distilled", reference)}.items():
        if one in columns and "accuracy" in columns[one]:
            found[name] = more_right(rows, one, other).summary()
    if "after" in gaps:
        closed = paired_difference(gaps["before"].nats, gaps["after"].nats)
        found["gap_closed"] = closed.summary()
    return found


def _keep_nats(
    rows: Sequence[dict[str, Any]], seen: Observed, cases: Sequence[Case], when: str
) -> None:
    """Put into the held-out cases' rows what `agreement_of` is made from, as NAME_nats."""
    row_of = dict(zip(map(id, cases), rows, strict=True))
    gap, apart = seen.gaps[when], seen.apart[when]
    for i, case in enumerate(seen.held_out):
        row_of[id(case)][f"{CONTENDERS[when][0]}_nats"] = {
            "missed": gap.missed[i],  # of each token that the prompted teacher says
            "likeliest": gap.likeliest.totals[i],
            "reverse_kl": apart.reverse_kl.totals[i],
            "forward_kl": apart.forward_kl.totals[i],
            "tokens": apart.reverse_kl.counts[i],  # of the model's own completion
        }


def agreement_of(gap: Gap, apart: Divergences) -> dict[str, Any]:
    """How far a model without the context is from the prompted teacher, in nats over tokens."""
    return {
        "gap": gap.nats.summary(),
        "top1_agreement": gap.likeliest.summary(),
        "reverse_kl": apart.reverse_kl.summary(),
        "forward_kl": apart.forward_kl.summary(),
    }


def read_scorecard(folder: Path) -> dict[str, Any] | None:
    """The scorecard in a folder; None where there is none that can be read."""
    try:
        found = parse_json((folder / "scorecard.json").read_text("utf-8"))
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def write_evaluation(folder: Path, found: Evaluation, setup: Setup) -> None:
    """scorecard.json, answers, report.md with its curve, the page and its evidence; settings where
    no run's are.

    The scorecard comes last: where it is, the others are its own.
    """
    metrics = read_metrics(folder / "metrics.jsonl")
    if not metrics:
        write_config(setup.config, folder / "config.yaml")
    write_jsonl(folder / "answers.jsonl", found.answers)
    for name, rows in (("elsewhere.jsonl", found.elsewhere), ("leak.jsonl", found.leak)):
        (folder / name).unlink(missing_ok=True)  # of a scorecard before, which may have had some
        if rows:
            write_jsonl(folder / name, rows)
    answers = {"test": found.answers, **found.test_sets}
    write_table(folder, list(found.card["contenders"]), answers, found.elsewhere)
    write_report(folder, found.card, found.answers, setup.config, metrics)
    evidence = write_evidence(folder, setup, found.card, found.card["distilled"])
    write_page(
        folder, Record(setup.config, metrics, evidence, found.card, found.answers, found.elsewhere)
    )
    write_json(folder / "scorecard.json", found.card)


def _check_same_kind(setup: Setup, distilled: str) -> None:
    base, folder = setup.config.model, Path(distilled)
    if is_adapter(folder):
        check_adapter(folder, base)
        return
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
