"""What was measured: in words, as a table, and as serving.json beside the run's report."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.evaluate import read_scorecard
from opcd.evaluation.evidence import renew_outputs
from opcd.evaluation.page import FILE as PAGE
from opcd.evaluation.page import Record, write_page
from opcd.evaluation.report import aligned, write_report
from opcd.evaluation.savings import FILE, selection_digest
from opcd.runtime.files import read_jsonl, read_metrics, write_json
from opcd.serving.break_even import BreakEven, Verdict
from opcd.serving.measure import Figures
from opcd.serving.room import Room
from opcd.serving.same_answers import Same
from opcd.serving.spread import Spread

FORMAT = 1
CPU = "figures from a CPU carry no claim about GPUs"
REPORT = "report.md"
# What files hold that a stranger wrote may be anything.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class Measured(NamedTuple):
    """A contender, and what it takes."""

    meaning: str
    figures: Figures
    room: Room


class Served(NamedTuple):
    """All that was found."""

    verdict: Verdict
    contenders: dict[str, Measured]
    break_even: list[BreakEven]  # in seconds of the device; in money, where prices were given
    same: dict[str, Same]  # of what was exported, by contender and dtype
    failed: dict[str, str]  # what could not be compared, and why
    how: list[str]  # by what it was measured, a line each
    made_by: dict[str, Any]

    @property
    def agrees(self) -> bool:
        """Whether what is served is what was measured, as far as that was looked at. What was meant
        to be compared and was in no dtype is not."""
        known = {_contender(name) for name in self.same}
        unknown = {_contender(name) for name in self.failed} - known
        return not unknown and all(same.agrees for same in self.same.values())

    @property
    def summary(self) -> list[str]:
        """For people, a line each; the verdict first."""
        same = [
            f"the served model is the measured model ({_contender(name)}): {found.line}"
            if found.agrees
            else f"THE SERVED MODEL IS NOT THE MEASURED MODEL ({_contender(name)}): {found.line}"
            for name, found in self.same.items()
        ]
        same += [
            f"the served model was not compared ({name}): {reason}"
            for name, reason in self.failed.items()
        ]
        paid = [line for found in self.break_even for line in found.lines]
        return [str(self.verdict), *self.how, *paid, *same]

    @property
    def table(self) -> list[list[str]]:
        """A head, and a row a contender; figures with what lies around them."""
        return table_of(self.contenders)

    @property
    def lines(self) -> list[str]:
        """For a terminal."""
        rows = [tuple(row) for row in self.table]
        return [aligned(rows, texts=1), "", *(f"  {line}" for line in self.summary)]

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "format": FORMAT,
            "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "made_by": self.made_by,
            "verdict": self.verdict._asdict(),
            "summary": self.summary,
            "table": self.table,
            "contenders": {name: _figures(found) for name, found in self.contenders.items()},
            "break_even": [
                {**found._asdict(), "saved": found.saved._asdict()} for found in self.break_even
            ],
            "same_answers": {name: found.as_dict() for name, found in self.same.items()},
            "not_compared": self.failed,
        }


def _contender(name: str) -> str:
    """Of a comparison's name, "distilled, float32"."""
    return name.partition(",")[0]


def table_of(contenders: Mapping[str, Measured]) -> list[list[str]]:
    """See `Served.table`."""
    loads = [load.at_once for load in next(iter(contenders.values())).figures.loads]
    head = [
        *("", "prompt tokens", "of them cached", "first token, ms", "a token, ms"),
        *(f"requests/s, {n} at once" for n in loads),
        *("KV a request, MiB", "requests that fit"),
    ]
    rows = []
    for name, (_, figures, room) in contenders.items():
        cached, own = figures.cached_tokens, room.own_mib
        rows.append(
            [
                name,
                f"{figures.prompt_tokens:.0f}",
                "–" if cached is None else f"{cached:.0f}",
                _around(figures.first_s.scaled(1000), 1),
                "–" if figures.each_s is None else _around(figures.each_s.scaled(1000), 1),
                *(_around(load.requests_per_s, 2) for load in figures.loads),
                "–" if own is None else f"{own:.1f}",
                "–" if room.fits is None else f"{room.fits:,}",
            ]
        )
    return [head, *rows]


def write_served(run: Path, config: TrainConfig, found: Served) -> list[Path]:
    """Write serving.json, and the run's report, evidence and page with it; returns what was.

    Raises InputError for files of the run that opcd did not write.
    """
    write_json(run / FILE, found.as_dict() | {"selection_sha256": selection_digest(run)})
    written, renewed = [run / FILE], [FILE]
    metrics, card = read_metrics(run / "metrics.jsonl"), read_scorecard(run)
    answers, elsewhere = (read_jsonl(run / name) for name in ("answers.jsonl", "elsewhere.jsonl"))
    try:
        if card is not None and (run / REPORT).is_file():
            write_report(run, card, answers, config, metrics)
            written.append(run / REPORT)
            renewed.append(REPORT)
        evidence = renew_outputs(run, renewed)
        if evidence is not None:
            write_page(run, Record(config, metrics, evidence, card, answers, elsewhere))
            written.append(run / PAGE)
    except InputError:
        raise
    except _MALFORMED as error:
        raise InputError(
            f"the files of {run} must be as opcd writes them, got {type(error).__name__}: {error}; "
            f"score the run again with opcd eval (the figures are in {run / FILE})"
        ) from error
    return written


def _figures(found: Measured) -> dict[str, Any]:
    meaning, figures, room = found
    each = figures.each_s
    return {
        "meaning": meaning,
        "first_token_s": figures.first_s._asdict(),
        "each_token_s": None if each is None else each._asdict(),
        "prompt_tokens": figures.prompt_tokens,
        "cached_tokens": figures.cached_tokens,
        "answer_tokens": figures.answer_tokens,
        "device_s": figures.device_s._asdict(),
        "loads": [
            {**load._asdict(), "requests_per_s": load.requests_per_s._asdict()}
            for load in figures.loads
        ],
        "room": {**room._asdict(), "own_mib": room.own_mib},
    }


def _around(spread: Spread, digits: int) -> str:
    middle, low, high = (f"{x:,.{digits}f}" for x in (spread.median, spread.low, spread.high))
    return f"{middle} ({low} – {high})"
