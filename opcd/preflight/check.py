"""A look at a prompt before it is distilled: what the models see, what they miss, what it costs."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import torch

from opcd.episodes import Episode, Prompt
from opcd.evaluation.agreement import Gap, gap_between, student_side, teacher_side
from opcd.evaluation.contenders import Answer, LoadedModel, Models
from opcd.evaluation.evaluate import episodes_of
from opcd.evaluation.intervals import wilson_interval
from opcd.evaluation.scorecard import accuracy
from opcd.passes.agreement import Agreement
from opcd.passes.hidden import Row
from opcd.passes.prefix import shared_prefix_length
from opcd.preflight.budget import Budget, budget, budget_lines
from opcd.preflight.rendering import Rendering, rendering, rendering_lines
from opcd.preflight.verdict import Found, Verdict, verdict
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case, spread
from opcd.teacher import teacher_of

SAMPLE = 64  # requests that are answered without and with the context
HARD = math.log(0.01)  # log p of a token that few rollouts will hold
MET_ANYWAY = 2  # places of an answer that a run meets and learns, however unlikely they are
PLACES = 8  # of an answer, whose likelihood is printed


class Checked(NamedTuple):
    """What was found, the verdict on it, and both for people."""

    found: Found
    verdict: Verdict
    rendering: Rendering
    likelihood: list[float]  # median p without the context, of the prompted answers' first tokens
    lost_at: str  # the token that is missed most
    lines: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "verdict": self.verdict._asdict(),
            **self.found._asdict(),
            "likelihood": self.likelihood,
            "lost_at": self.lost_at,
            "rendering": self.rendering._asdict(),
        }


def check(
    setup: Setup,
    run_seconds: Callable[[], float],  # how long a run would take here; called where it fits
    progress: Progress | None = None,
    expected_requests: float | None = None,  # that come between two changes of the prompt, if known
) -> Checked:
    """Measure on a sample of the requests; says each part as it is known."""
    progress = progress or Progress()
    lines: list[str] = []

    def say(*said: str) -> None:
        lines.extend(said)
        for line in said:
            progress.say(line)

    config, task = setup.config, setup.task
    cases = spread(task.validation or task.training or task.test, SAMPLE)
    seen = rendering(setup, cases)
    say(*rendering_lines(seen))
    needs = budget(setup)
    say(*budget_lines(needs))
    models = Models(setup)
    try:
        teacher_model = models.get(config.teacher or config.model)
        said = teacher_model.prompted(cases)
        teacher = teacher_of(teacher_model.model, task.prefixes, config)
        shown = teacher_side(teacher, episodes_of(cases, said, cases))
        student = models.get(config.model)
        alone = student.alone(cases)
        missed = student_side(student.model, student.plan, shown.episodes, config)
        gap = gap_between(missed, shown, config.temperature)
        wrong = [*seen.differing, *_without_context(setup, student, cases, alone)]
        seconds_saved = _reading_seconds(student, setup, cases)
    finally:
        models.close()
    found = _found(setup, cases, alone, said, gap)._replace(
        wrong_inputs="; ".join(wrong[:3]), expected_requests=expected_requests, **_memory(needs)
    )
    likelihood, lost_at = _along(gap, shown.episodes, setup)
    say(*_lines(found, likelihood, lost_at))
    if setup.task.train and found.needed_bytes <= found.room_bytes:
        seconds = run_seconds()
        found = found._replace(pays_after=seconds / max(seconds_saved, 1e-9))
        say(
            f"time      about {seconds / 60:.1f} min for a run on this machine; reading the prompt "
            f"takes {1000 * seconds_saved:.0f} ms a request here without a prefix cache, so that a "
            f"run pays after {found.pays_after:,.0f} requests"
        )
    decided = verdict(found)
    say(f"verdict   {decided}")
    return Checked(found, decided, seen, likelihood, lost_at, lines)


def _found(
    setup: Setup,
    cases: Sequence[Case],
    alone: Sequence[Answer],
    said: Sequence[Answer],
    gap: Gap,
) -> Found:
    n = len(cases)
    changed = sum(a.text != b.text for a, b in zip(alone, said, strict=True))
    nats = gap.nats.summary()
    judged: dict[str, Any] = {}
    if setup.task.judges(cases):
        theirs = [answer.text for answer in said]
        for name, answers in (("base", alone), ("prompted", said)):
            right = accuracy(answers, cases, setup.task.scorer, theirs)
            judged |= {name: right, f"{name}_interval": tuple(wilson_interval(right * n, n))}
        judged["constant"] = _best_constant(setup, cases, theirs)
    return Found(
        requests=n,
        changed=changed / n,
        changed_interval=_pair(wilson_interval(changed, n)),
        gap=nats["mean"],
        gap_interval=_pair(nats["interval_95"]),
        hard_tokens=fmean(
            sum(logprob < HARD for logprob in answer[MET_ANYWAY:])
            for answer in gap.student_logprobs
        ),
        cut=fmean(answer.finish == "length" for answer in said),
        empty=fmean(not answer.text for answer in said),
        guided_share=setup.config.guided_share,
        **judged,
    )


def _best_constant(setup: Setup, cases: Sequence[Case], theirs: Sequence[str]) -> float | None:
    """What the commonest accepted answer alone would reach; None where answers are many."""
    counts = Counter(a for case in cases for a in set(case.example.answers))
    if not counts or max(counts.values()) < 2:
        return None
    answer, _ = counts.most_common(1)[0]
    always = [Answer(answer, [], "stop", answer)] * len(cases)
    return accuracy(always, cases, setup.task.scorer, theirs)


def _without_context(
    setup: Setup, student: LoadedModel, cases: Sequence[Case], alone: Sequence[Answer]
) -> list[str]:
    """How a teacher of the same weights differs where its context is empty; [] where it does not.

    Its prefix is then what the student's own prompts begin with: both paths must agree.
    """
    config = setup.config
    ids = [case.prompt.student_ids for case in cases]
    length = shared_prefix_length([*ids, [*ids[0][:-1], -1]])
    if config.teacher or length == 0:
        return []
    episodes = []
    for own, answer in zip(ids, alone, strict=True):
        prompt = Prompt(own, own[length:])
        episodes.append(Episode.of_completion(prompt, answer.token_ids, answer.finish))
    episodes = episodes[:8]
    teacher = teacher_of(student.model, {"": ids[0][:length]}, config)
    ours = student_side(student.model, student.plan, episodes, config)
    theirs = teacher_side(teacher, episodes)
    rows = [Row(e.student_ids, e.student_spans) for e in episodes]
    wrong = Agreement(student.model, ours.hidden, rows, ours.hidden).wrong(theirs.hidden)
    return [] if wrong is None else [f"behind an empty context {wrong}"]


@torch.no_grad()
def _reading_seconds(student: LoadedModel, setup: Setup, cases: Sequence[Case]) -> float:
    """What reading the context takes in one request, without a prefix cache: median of three."""
    prompt, found = cases[0].prompt, []
    device = setup.device
    for ids in (setup.task.prompted_ids(prompt), prompt.student_ids):
        tokens = torch.tensor([ids], device=device)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            student.model(tokens, logits_to_keep=1).logits.sum().item()
            times.append(time.perf_counter() - begin)
        found.append(median(times))
    return max(found[0] - found[1], 0.0)


def _along(gap: Gap, episodes: Sequence[Episode], setup: Setup) -> tuple[list[float], str]:
    """The likelihood of the prompted answers without the context, token by token, and where the
    most is missed."""
    likelihood = []
    for place in range(PLACES):
        there = [math.exp(a[place]) for a in gap.student_logprobs if len(a) > place]
        if len(there) * 2 >= len(episodes):
            likelihood.append(median(there))
    missed: Counter[int] = Counter()
    for episode, answer in zip(episodes, gap.student_logprobs, strict=True):
        for token, logprob in zip(episode.scored_ids, answer, strict=True):
            missed[token] -= round(1000 * logprob)
    token, _ = missed.most_common(1)[0]
    return likelihood, setup.tokenizer.decode([token])


def _memory(made: Budget) -> dict[str, Any]:
    """What a verdict must know of memory; nothing where the model's needs are not known."""
    if isinstance(made.needs, str) or made.room.available is None:
        return {}
    fits = [r for r in made.remedies if r.needed <= made.room.available]
    settings = fits[-1].settings if fits else {}
    return {
        "needed_bytes": made.needs.memory.needed,
        "room_bytes": made.room.available,
        "fits_with": ", ".join(f"{name} to {value}" for name, value in settings.items()),
    }


def _lines(found: Found, likelihood: Sequence[float], lost_at: str) -> list[str]:
    low, high = found.changed_interval
    lines = [
        f"prompt    changes {found.changed:.0%} of {found.requests} greedy answers ({low:.0%} – "
        f"{high:.0%})",
        f"gap       {found.gap:.2f} nats a token ({found.gap_interval[0]:.2f} – "
        f"{found.gap_interval[1]:.2f}) on what it makes the model say; most is missed at "
        f"{lost_at!r}",
        f"reach     without it the answer's first tokens have the probabilities "
        f"{', '.join(f'{p:.2g}' for p in likelihood)} (medians); behind the first "
        f"two an answer holds {found.hard_tokens:.1f} below 0.01",
    ]
    if found.prompted is not None and found.base_interval and found.prompted_interval:
        constant = "" if found.constant is None else f"; one answer for all {found.constant:.0%}"
        lines.append(
            f"accuracy  without it {found.base:.1%} ({found.base_interval[0]:.0%} – "
            f"{found.base_interval[1]:.0%}), with it {found.prompted:.1%} "
            f"({found.prompted_interval[0]:.0%} – {found.prompted_interval[1]:.0%}){constant}"
        )
    return lines


def _pair(interval: Sequence[float]) -> tuple[float, float]:
    low, high = interval
    return low, high
