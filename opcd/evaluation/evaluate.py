"""A run's models before and after, without and with the context, on its test data."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from opcd.config.settings import write_config
from opcd.episodes import Episode
from opcd.errors import InputError
from opcd.evaluation.agreement import (
    Divergences,
    Gap,
    Side,
    divergences,
    gap_between,
    own_side,
    student_side,
    teacher_side,
)
from opcd.evaluation.constant import best_constant
from opcd.evaluation.contenders import (
    Answer,
    Contender,
    LoadedModel,
    Models,
    both_contenders,
)
from opcd.evaluation.decoding import answer_params, decoding_of, rollout_params
from opcd.evaluation.elsewhere import Elsewhere, held_against, original_side
from opcd.evaluation.elsewhere_tasks import Results, compared, results_of, tasks_of
from opcd.evaluation.evidence import write_evidence
from opcd.evaluation.intervals import paired_difference
from opcd.evaluation.leak import Revealed, context_grams, leak, leak_rows, revealed
from opcd.evaluation.measured import measured_by
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
from opcd.tasks.task import Case, spread
from opcd.teacher import SharedPrefixTeacher, teacher_of

CONTENDERS = {"before": ("base", "prompted"), "after": ("distilled", "distilled_prompted")}


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
    config, task = setup.config, setup.task
    cases = task.scored
    tasks_of(config)
    teacher_name = config.teacher or config.model
    names = {"before": config.model}
    if distilled is not None:
        _check_same_kind(setup, distilled)
        names["after"] = distilled
    held_out = spread(task.test, config.divergence_prompts)
    models = Models(setup, answer_params(setup))
    contenders: list[Contender] = []
    answers: dict[str, list[Answer]] = {}
    owns: dict[str, Side] = {}
    gaps: dict[str, Gap] = {}
    original: Side | None = None
    elsewhere: Elsewhere | None = None
    wanted = bool(setup.elsewhere) and distilled is not None
    secret = context_grams(setup) if config.leak_tokens else set()
    told: dict[str, Revealed | None] = {}
    judged: dict[str, Results] = {}  # by tasks of lm-eval
    named = others(models)
    progress.begin("evaluate", total=1 + (4 if wanted else 3) * len(names) + len(named))
    try:
        said = models.get(teacher_name).prompted(cases)
        shown = teacher_side(_teacher(models, setup), episodes_of(cases, said, held_out))
        progress.part("prompted teacher")
        for when, name in names.items():
            pair = both_contenders(models, name, when, CONTENDERS[when])
            for contender in pair:
                same = contender.name == "prompted" and name == teacher_name
                answers[contender.name] = said if same else contender.answer(cases)
                progress.part(contender.name)
            owns[when], missed = _sides(models.get(name), held_out, shown)
            gaps[when] = gap_between(missed, shown, config.temperature)
            contenders += pair
            if when == "before" and teacher_name != config.model:
                contenders.append(Contender("teacher", _who(teacher_name), lambda _: said))
                answers["teacher"] = said
            if secret:
                told[pair[0].name] = revealed(models.get(name), prompted=False)
                if when == "before":
                    told["prompted"] = revealed(models.get(name), prompted=True)
            if config.elsewhere_tasks and distilled is not None:
                judged[when] = results_of(models.get(name))
            if wanted:
                if original is None:
                    original = original_side(models.get(name))
                else:
                    elsewhere = held_against(original, models.get(name))
                progress.part(f"elsewhere {when}")
        for contender in named:
            answers[contender.name] = contender.answer(cases)
            progress.part(contender.name)
        contenders += named
        teacher = _teacher(models, setup)
        apart: dict[str, Divergences] = {}
        for when, own in owns.items():
            theirs = teacher_side(teacher, own.episodes)
            apart[when] = divergences(own, theirs, config.temperature)
            progress.part(f"divergence {when}")
    finally:
        progress.end()
        models.close()
    found, rows = reached(contenders, answers, said, task.test, task.scorer, gaps)
    columns = found["contenders"]
    for when, (alone, _) in CONTENDERS.items():
        if when in names:
            columns[alone] |= agreement_of(gaps[when], apart[when])
            _keep_nats(rows, task.test, held_out, alone, gaps[when], apart[when])
    card = {
        "context": config.context,
        "model": config.model,
        "distilled": distilled,
        "teacher": teacher_name,
        **found,
        "divergence": {
            **{w: apart[w].reverse_kl.mean if w in apart else None for w in CONTENDERS},
            "unit": "nats per completion token, student || teacher",
            "prompts": len(held_out),
        },
        "prompt_tokens_saved": task.prompt_tokens_saved,
        "scorer": config.scorer if task.judges(task.test) else None,
        "decoding": decoding_of(setup),
        "data": {
            "part": "test" if config.test_data else "held out",
            "file": config.test_data or config.prompts,
        },
        "measured_by": measured_by(setup),
    }
    begin, more = len(task.test), {}
    for name, of_set in task.test_sets.items():
        here = slice(begin, begin := begin + len(of_set))
        own_answers = {who: given[here] for who, given in answers.items()}
        found, more[name] = reached(contenders, own_answers, said[here], of_set, task.scorer)
        card.setdefault("test_sets", {})[name] = {"file": config.test_sets[name], **found}
    if selection is not None:
        card["selection"] = selection
    if elsewhere is not None:
        card["elsewhere"] = elsewhere.card
    if judged:
        card["elsewhere_tasks"] = compared(judged)
    leaks = {who: by for who, by in told.items() if by is not None}
    if leaks:
        card["leak"] = leak(secret, leaks, setup)
    if distilled is not None:
        card["verdict"] = verdict(card, config.shown_share)._asdict()
    return Evaluation(
        card, rows, elsewhere.answers if elsewhere is not None else [], more, leak_rows(leaks)
    )


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


def _who(teacher: str) -> str:
    return f"{Path(teacher).name}, with the context"


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


def episodes_of(
    cases: Sequence[Case], answers: Sequence[Answer], wanted: Sequence[Case]
) -> list[Episode]:
    """The answers to some of the cases, as what both models score."""
    by_case = dict(zip(map(id, cases), answers, strict=True))
    return [
        Episode.of_completion(case.prompt, answer.token_ids, answer.finish)
        for case in wanted
        for answer in [by_case[id(case)]]
    ]


def _sides(student: LoadedModel, held_out: Sequence[Case], shown: Side) -> tuple[Side, Side]:
    """What a student samples itself, and what it makes of the teacher's answers."""
    model, plan, engine, setup, _ = student
    config, params = setup.config, rollout_params(setup)
    own = own_side(model, plan, engine, [c.prompt for c in held_out], params, config)
    return own, student_side(model, plan, shown.episodes, config)


def _teacher(models: Models, setup: Setup) -> SharedPrefixTeacher:
    config = setup.config
    return teacher_of(models.get(config.teacher or config.model).model, setup.task.prefixes, config)


def _keep_nats(
    rows: Sequence[dict[str, Any]],  # of the scorecard, one for each case
    cases: Sequence[Case],
    held_out: Sequence[Case],
    name: str,
    gap: Gap,
    apart: Divergences,
) -> None:
    """Put into the rows of the held-out cases what `agreement_of` is made from, as NAME_nats."""
    row_of = dict(zip(map(id, cases), rows, strict=True))
    for i, case in enumerate(held_out):
        row_of[id(case)][f"{name}_nats"] = {
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
