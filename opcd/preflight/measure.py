"""What the models make of a sample of requests, without the context and with it."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from opcd.episodes import Episode, Prompt
from opcd.evaluation.agreement import Gap, Side, gap_between, student_side, teacher_side
from opcd.evaluation.constant import best_constant
from opcd.evaluation.contenders import Answer, LoadedModel, Models
from opcd.evaluation.intervals import PerRequest, paired_difference, wilson_interval
from opcd.evaluation.observed import episodes_of
from opcd.evaluation.scorecard import accuracy
from opcd.models.lm import last_logits
from opcd.passes.agreement import Agreement
from opcd.passes.hidden import Row
from opcd.passes.prefix import shared_prefix_length
from opcd.preflight.verdict import Example, Measured
from opcd.runtime.batches import batches_by_tokens
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case, spread
from opcd.teacher import teacher_of

HARD = math.log(0.01)  # log p of a token that few samples hold
MET = 2  # hard tokens of an answer that own samples come to: those of a label, which is learned
PLACES = 8  # of an answer, whose likelihood is kept
COMPARED = 8  # answers that are passed behind an empty context
READINGS = 3  # of a prompt, that are timed
EXAMPLES = 3  # requests whose answers are shown


class Alone(NamedTuple):
    """A model without the context: what it says, and what it misses of the prompted answers."""

    answers: list[Answer]
    gap: Gap


def measure(setup: Setup, cases: Sequence[Case]) -> Measured:
    """Ask the teacher with and without the context, and the student without it.

    One model is in memory at a time, none when this returns, and none is loaded twice: what is
    kept of one are numbers, and the teacher's head.
    """
    config = setup.config
    teacher = config.teacher or config.model
    models = Models(setup)
    try:
        said, shown = _prompted(models.get(teacher), cases)
        unprompted = student = _alone(models.get(teacher), cases, shown)
        if teacher != config.model:
            student = _alone(models.get(config.model), cases, shown)
        found = summarised(setup, cases, said, unprompted, student)
        return found._replace(
            empty_context=_empty_context(models.get(config.model), cases, student.answers),
            reading_s=_reading_seconds(models.get(config.model), cases[0].prompt),
        )
    finally:
        models.close()


def _prompted(model: LoadedModel, cases: Sequence[Case]) -> tuple[list[Answer], Side]:
    """A teacher's answers behind the context, and what it makes of their tokens."""
    setup, said = model.setup, model.prompted(cases)
    teacher = teacher_of(model.model, setup.task.prefixes, setup.config)
    return said, teacher_side(teacher, episodes_of(cases, said, cases))


def _alone(model: LoadedModel, cases: Sequence[Case], shown: Side) -> Alone:
    config = model.setup.config
    own = student_side(model.model, model.plan, shown.episodes, config)
    return Alone(model.alone(cases), gap_between(own, shown, config.temperature))


def summarised(
    setup: Setup,
    cases: Sequence[Case],
    said: Sequence[Answer],  # by the prompted teacher
    unprompted: Alone,  # the teacher
    student: Alone,  # the same where they are one model
) -> Measured:
    """Answers and gaps in numbers."""
    n = len(cases)
    changed = sum(a.text != b.text for a, b in zip(unprompted.answers, said, strict=True))
    shift, gap = unprompted.gap.nats.summary(), student.gap.nats.summary()
    return Measured(
        requests=n,
        changed=changed / n,
        changed_interval=_pair(wilson_interval(changed, n)),
        shift=shift["mean"],
        shift_interval=_pair(shift["interval_95"]),
        gap=gap["mean"],
        gap_interval=_pair(gap["interval_95"]),
        unmet=_unmet(student.gap),
        hard_tokens=fmean(sum(p < HARD for p in answer) for answer in student.gap.student_logprobs),
        tokens=fmean(answer.tokens for answer in said),
        likelihood=_likelihood(student.gap),
        missed_at=setup.tokenizer.decode([_missed_at(said, student.gap)]),
        cut=fmean(answer.finish == "length" for answer in said),
        empty=fmean(not answer.text for answer in said),
        examples=_examples(cases, unprompted.answers, said),
        **_judged(setup, cases, said, unprompted, student),
    )


def _examples(
    cases: Sequence[Case], unprompted: Sequence[Answer], said: Sequence[Answer]
) -> list[Example]:
    """Requests whose answers the prompt changes, spread over the sample; any if it changes none."""
    each = [
        Example(case.example.text, a.text, b.text)
        for case, a, b in zip(cases, unprompted, said, strict=True)
    ]
    return spread([x for x in each if x.without != x.prompted] or each, EXAMPLES)


def _judged(
    setup: Setup,
    cases: Sequence[Case],
    said: Sequence[Answer],
    unprompted: Alone,
    student: Alone,
) -> dict[str, Any]:
    """Accuracies, and what the prompt gains; nothing where nothing says what is right."""
    if not setup.task.judges(cases):
        return {}

    def values(answers: Sequence[Answer]) -> PerRequest:
        each = zip(answers, cases, said, strict=True)
        scorer = setup.task.scorer
        return PerRequest([accuracy([a], [c], scorer, [s.text]) for a, c, s in each], [1] * n)

    n = len(cases)
    prompted, base = values(said), values(student.answers)
    teacher = base if unprompted is student else values(unprompted.answers)
    gains = [paired_difference(prompted, without) for without in (teacher, base)]
    constant = best_constant(cases, setup.task.scorer, [answer.text for answer in said])
    return {
        "base": base.mean,
        "unprompted": None if unprompted is student else teacher.mean,
        "prompted": prompted.mean,
        "gain": min(gains, key=lambda gain: gain.mean),
        "constant": constant.accuracy if constant is not None else None,
    }


def _unmet(gap: Gap) -> float:
    """Share of the missed nats at hard tokens behind the first hard ones of an answer."""
    behind = 0.0
    for logprobs, missed in zip(gap.student_logprobs, gap.missed, strict=True):
        hard = [nats for p, nats in zip(logprobs, missed, strict=True) if p < HARD]
        behind += sum(max(nats, 0.0) for nats in hard[MET:])
    total = sum(max(nats, 0.0) for answer in gap.missed for nats in answer)
    return behind / total if total else 0.0


def _likelihood(gap: Gap) -> list[float]:
    """Median p of the answers' first tokens for the student, as far as half of them are as long."""
    answers = gap.student_logprobs
    places = [[math.exp(a[i]) for a in answers if len(a) > i] for i in range(PLACES)]
    return [median(there) for there in places if 2 * len(there) >= len(answers)]


def _missed_at(said: Sequence[Answer], gap: Gap) -> int:
    """The token at which the student misses most, over all answers."""
    missed: Counter[int] = Counter()
    for answer, nats in zip(said, gap.missed, strict=True):
        for token, lost in zip(answer.token_ids, nats, strict=True):
            missed[token] += round(1000 * lost)
    return missed.most_common(1)[0][0]


def _empty_context(
    model: LoadedModel, cases: Sequence[Case], answers: Sequence[Answer]
) -> float | None:
    """How far a teacher of the same weights is from the student where its context is empty.

    Its prefix is then what the student's own prompts begin with. In nats a token of the student's
    answers, 0 where rounding explains them; None where the two models are none, or their prompts
    begin with no common token.
    """
    config, ids = model.setup.config, [case.prompt.student_ids for case in cases]
    length = shared_prefix_length([*ids, [*ids[0][:-1], -1]])  # leaves a token of each
    if config.teacher or length == 0:
        return None
    episodes = [
        Episode.of_completion(Prompt(own, own[length:]), answer.token_ids, answer.finish)
        for own, answer in zip(ids[:COMPARED], answers, strict=False)
    ]
    sizes = [len(episode.student_ids) for episode in episodes]
    one_pass = next(batches_by_tokens(sizes, config.max_tokens_per_pass))
    episodes = [episodes[i] for i in one_pass]
    teacher = teacher_of(model.model, {"": ids[0][:length]}, config)
    ours = student_side(model.model, model.plan, episodes, config).hidden
    theirs = teacher_side(teacher, episodes).hidden
    rows = [Row(episode.student_ids, episode.student_spans) for episode in episodes]
    agreement = Agreement(model.model, ours, rows, ours)
    return agreement.gap(theirs) if agreement.wrong(theirs) else 0.0


def _reading_seconds(model: LoadedModel, prompt: Prompt) -> float | None:
    """What reading the context takes in a request that comes alone, without a prefix cache."""
    with_context = model.setup.task.prompted_ids(prompt)
    times = [
        [_pass_seconds(model.model, ids) for _ in range(READINGS)]
        for ids in (with_context, prompt.student_ids)
    ]
    return beyond_spread(*times)


@torch.no_grad()
def _pass_seconds(model: torch.nn.Module, ids: Sequence[int]) -> float:
    device = next(model.parameters()).device
    tokens = torch.tensor([[*ids]], device=device)
    begin = time.perf_counter()
    model(tokens, **last_logits(model)).logits.sum().item()  # a GPU has ended by then
    return time.perf_counter() - begin


def beyond_spread(longer: Sequence[float], shorter: Sequence[float]) -> float | None:
    """By how much one is longer, in the median; None where some of it is no longer than the other
    at its longest."""
    return median(longer) - median(shorter) if min(longer) > max(shorter) else None


def _pair(interval: Sequence[float]) -> tuple[float, float]:
    low, high = interval
    return low, high
