"""START HERE: the loop. A model distils what it learned from its own attempts.

attempt ── the model as it is, at problems with answers (or a server's log) ──► attempts
extract ── items that it writes about them, right attempts as demonstrations ──► experience
filter  ── contexts made of that, scored on validation problems ──► the best one, if it helps
distil  ── as any other context, into the weights ──► new weights
gate    ── better on validation beyond chance, and not worse elsewhere? taken, else rolled back

What a phase finds is a file, complete or absent; a loop that was killed reads those that are there
and makes the others, with the same draws.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from opcd.experience.distilling import Distilling, Shown, Stopped
from opcd.experience.exercises import Exercises
from opcd.experience.final import final_columns
from opcd.experience.fitting import keep_fitting
from opcd.experience.folder import Given, begin
from opcd.experience.games.exercises import Games
from opcd.experience.measuring import Bench
from opcd.experience.phases import Phases, Round, Say
from opcd.experience.problems import Problems
from opcd.experience.report import write_report
from opcd.experience.settings import Settings
from opcd.runtime.alone import alone
from opcd.runtime.files import write_jsonl
from opcd.runtime.progress import Progress


class Outcome(NamedTuple):
    """What has become of a loop."""

    folder: Path
    rounds: list[dict[str, Any]]  # as in rounds.jsonl
    columns: dict[str, Any]  # of the final test; {} where the loop was stopped before
    stopped: str | None = None  # why; resume goes on


def learn(
    settings: Settings,
    resume: bool = False,
    say: Say = lambda text: None,
    shown: Shown = lambda: _Silent(),
) -> Outcome:
    """Run all rounds, then look at the test problems, once.

    say: gets lines for people. shown: opens what a distillation tells, and may stop it.
    Raises InputError for whatever a user gave that does not fit.
    """
    settings.training.check()
    with alone(Path(settings.training.output_dir), "loop"), exercises_of(settings) as exercises:
        given = begin(settings, exercises, resume)
        bench = Bench(given.settings.training, given.folder, exercises)
        keep_fitting(given, bench)
        try:
            return _learn(given, Phases(given, bench, Distilling(given, bench, shown), say))
        finally:
            bench.release()


def exercises_of(settings: Settings) -> Exercises:
    """Games where the settings name one, else problems."""
    return Games(settings) if settings.experience.game else Problems(settings)


def _learn(given: Given, phases: Phases) -> Outcome:
    rounds: list[Round] = []
    columns: dict[str, Any] = {}
    stopped = None
    train, validation, test = map(len, given.exercises.parts)
    phases.say(
        f"{given.settings.kind:<9} {train} to learn from, {validation} to choose by, {test} to be "
        f"looked at once"
    )
    try:
        for one in _rounds(phases):
            rounds.append(one)
            _write(given, rounds, columns)
        columns = final_columns(rounds, phases)
    except Stopped as why:
        stopped = str(why)
    _write(given, rounds, columns)
    return Outcome(given.folder, [one.row for one in rounds], columns, stopped)


def _rounds(phases: Phases) -> Iterator[Round]:
    """Each round from the weights that the one before it left."""
    weights = phases.original
    for number in range(1, phases.experience.rounds + 1):
        one = phases.round(number, weights)
        taken = "accepted" if one.decision.accepted else "rolled back"
        phases.say(f"round {number}   {taken}: {one.decision.reason}")
        yield one
        weights = one.weights


def _write(given: Given, rounds: list[Round], columns: dict[str, Any]) -> None:
    """rounds.jsonl and the report, of what is there so far."""
    rows = [one.row for one in rounds]
    write_jsonl(given.folder / "rounds.jsonl", rows)
    contexts = {one.number: one.contexts for one in rounds}
    write_report(given.folder, rows, contexts, columns, given.settings)


class _Silent(Progress):
    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""
