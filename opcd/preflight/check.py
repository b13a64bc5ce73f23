"""A look at a prompt before it is distilled: what the models see, what they miss, what it costs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.evaluation.evidence import renew_outputs
from opcd.evaluation.intervals import Difference
from opcd.evaluation.measured import measured_by
from opcd.evaluation.report import excerpt
from opcd.preflight.budget import Budget, budget, budget_lines
from opcd.preflight.measure import measure
from opcd.preflight.rendering import Rendering, rendering, rendering_lines
from opcd.preflight.sample import sample, sample_line
from opcd.preflight.verdict import UNMET, Example, Found, Measured, Verdict, hindrance, verdict
from opcd.runtime.files import write_json
from opcd.runtime.memory import release_memory
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup

FILE = "check.json"
SHOWN = 100  # characters of a text


class Checked(NamedTuple):
    """What was found, the verdict on it, and both for people."""

    found: Found
    verdict: Verdict
    rendering: Rendering
    measured_by: dict[str, str | None]  # digests that tell prompts and models apart
    lines: list[str]  # all that was said
    summary: list[str]  # the part of it that a report repeats

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        found = self.found._asdict()
        if (measured := self.found.measured) is not None:
            gain = measured.gain.summary() if measured.gain is not None else None
            examples = [example._asdict() for example in measured.examples]
            found["measured"] = measured._asdict() | {"gain": gain, "examples": examples}
        return {
            "verdict": self.verdict._asdict(),
            **found,
            "rendering": self.rendering._asdict(),
            "measured_by": self.measured_by,
            "summary": self.summary,
        }

    def write(self, folder: Path) -> None:
        """Into check.json, which the report of a run there repeats."""
        write_json(folder / FILE, self.as_dict())
        renew_outputs(folder, [FILE])


def check(
    setup: Setup,
    run_seconds: Callable[[], float],  # how long a run would take here; called where it fits
    progress: Progress | None = None,
    expected_requests: float | None = None,  # that come between two changes of the prompt, if known
) -> Checked:
    """Measure on a sample of the requests; says each part as it is known.

    What speaks against a run without a look at the models is said before any is loaded, and ends
    the check. Raises InputError for a number of requests that is none.
    """
    if expected_requests is not None and not 0 < expected_requests < math.inf:
        raise InputError(f"expected_requests must be a positive number, got {expected_requests}")
    progress = progress or Progress()
    lines: list[str] = []

    def say(*said: str) -> None:
        lines.extend(said)
        for line in said:
            progress.say(line)

    cases = sample(setup.task)
    seen = rendering(setup, cases)
    say(*rendering_lines(seen), *setup.prompt_lines, *setup.notes)
    needs = budget(setup) if setup.task.training else None
    if needs is not None:
        say(*budget_lines(needs))
    repeated, examples = len(lines), []
    say(sample_line(cases, setup.task))
    found = Found(
        wrong_inputs="; ".join(seen.differing[:3]),
        guided_share=setup.config.shown_share,
        expected_requests=expected_requests,
        **({} if needs is None else _needed(needs)),
    )
    decided = hindrance(found)
    if decided is None:
        measured = measure(setup, cases)
        found = found._replace(measured=measured)
        say(*_measured_lines(measured, setup))
        examples = [_example_line(example) for example in measured.examples]
        say(*examples)
        if found.fits:
            release_memory()
            seconds = run_seconds()
            pays_after = seconds / measured.reading_s if measured.reading_s else None
            found = found._replace(pays_after=pays_after)
            say(_time_line(seconds, measured, pays_after))
        elif needs is not None:
            say("time      not measured: nobody knows whether a step would fit")
        decided = verdict(found)
    say(f"verdict   {decided}")
    summary = [line for line in lines[repeated:] if line not in examples]
    return Checked(found, decided, seen, measured_by(setup), lines, summary)


def _needed(made: Budget) -> dict[str, Any]:
    """What a verdict must know of memory and disk; nothing where a model's needs are not known."""
    if isinstance(made.needs, str):
        return {}
    remedy = made.remedy(made.room.available)
    return {
        "memory_needed": made.needs.memory.needed,
        "memory_free": made.room.available,
        "fits_with": str(remedy) if remedy is not None else "",
        "disk_needed": made.needs.disk.peak,
        "disk_free": made.free,
    }


def _measured_lines(measured: Measured, setup: Setup) -> list[str]:
    low, high = measured.changed_interval
    least, most = measured.gap_interval
    whose = teachers = ""
    if setup.config.teacher:
        whose, teachers = " of the teacher", f" (the teacher misses {measured.shift:.2f})"
    lines = [
        f"prompt    changes {measured.changed:.0%} of {measured.requests} greedy answers{whose} "
        f"({low:.0%} – {high:.0%})",
        f"gap       {measured.gap:.2f} nats a token ({least:.2f} – {most:.2f}) on what it makes "
        f"the model say{teachers}; most is missed at {measured.missed_at!r}",
        f"reach     without it the answer's first tokens have the probabilities "
        f"{', '.join(f'{p:.2g}' for p in measured.likelihood)} (medians), and "
        f"{measured.hard_tokens:.1f} of its {measured.tokens:.1f} tokens are hard (below 0.01); "
        f"{measured.unmet:.0%} of the gap lies at hard tokens after the first two, which the "
        f"model's own samples rarely reach (above {UNMET:.0%} it needs guided_share)",
    ]
    if measured.gain is not None:
        lines.append(_accuracy_line(measured, measured.gain))
    if measured.empty_context:
        lines.append(
            f"passes    behind an empty context teacher and student differ by "
            f"{measured.empty_context:.2g} nats a token, more than rounding explains"
        )
    return lines


def _example_line(example: Example) -> str:
    request, without, prompted = (excerpt(text, SHOWN) for text in example)
    return f"example   {request!r}: without the prompt {without!r}, with it {prompted!r}"


def _accuracy_line(measured: Measured, gain: Difference) -> str:
    teacher = constant = ""
    if measured.unprompted is not None:
        teacher = f", the teacher without it {measured.unprompted:.1%}"
    if measured.constant is not None:
        constant = f"; one answer for all {measured.constant:.1%}"
    low, high = (100 * x for x in gain.interval)
    return (
        f"accuracy  without it {measured.base:.1%}{teacher}, with it {measured.prompted:.1%}: "
        f"{100 * gain.mean:+.1f} points ({low:+.1f} – {high:+.1f}, p {gain.p_value:.2g}){constant}"
    )


def _time_line(seconds: float, measured: Measured, pays_after: float | None) -> str:
    run = f"time      about {seconds / 60:.1f} min for a run on this machine; "
    if measured.reading_s is None or pays_after is None:
        return f"{run}reading the prompt takes less than what timing a request varies by"
    return (
        f"{run}reading the prompt takes {1000 * measured.reading_s:.0f} ms of a request that comes "
        f"alone, without a prefix cache: a run pays after {pays_after:,.0f} such requests"
    )
