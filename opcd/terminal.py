"""What a person at a terminal sees of a run, and how Ctrl-C reaches it."""

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from opcd.config import TrainConfig
from opcd.config.settings import code_of
from opcd.evaluation.evaluate import Evaluation, read_scorecard
from opcd.evaluation.facts import set_lines
from opcd.evaluation.report import (
    before_after,
    raised_alarms,
    scorecard_facts,
    scorecard_table,
)
from opcd.evaluation.side_by_side import SideBySide
from opcd.evaluation.verdict import Verdict
from opcd.experience.rounds import Outcome as Learned
from opcd.runtime.files import read_metrics, shown
from opcd.runtime.interrupts import Interrupts
from opcd.runtime.progress import Progress
from opcd.serving.report import Served
from opcd.training.export import read_selection
from opcd.training.run import Outcome

SECONDS_A_LINE = 30.0  # between lines about a phase, where no terminal shows a bar


class Terminal(Progress):
    """Prints what a run tells. A signal lets it finish its step; a second one kills.

    Signals are the caller's own again where the context ends.
    """

    def __init__(self, finishes_steps: bool = True) -> None:
        self._interrupts = Interrupts(lambda text: print(text, flush=True))
        self._finishes_steps = finishes_steps
        self._phase: _Bar | _Lines | None = None

    @property
    def caught(self) -> int | None:
        """The number of a signal that came."""
        return self._interrupts.caught

    def __enter__(self) -> "Terminal":
        if self._finishes_steps:
            self._interrupts.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._interrupts.release()

    def say(self, text: str) -> None:
        """See Progress.say. A bar gives way."""
        with tqdm.external_write_mode():
            print(text, flush=True)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """See Progress.begin."""
        at_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._phase = (_Bar if at_terminal else _Lines)(what, total, done)

    def part(self, note: str, metrics: dict[str, Any] | None = None) -> None:
        """See Progress.part."""
        assert self._phase is not None
        self._phase.part(note)

    def end(self) -> None:
        """See Progress.end. Behind the last step nothing is left that a signal could finish."""
        if self._phase is not None:
            self._phase.end()
        self._interrupts.release()

    def stop(self) -> str | None:
        """The name of a signal that came."""
        caught = self._interrupts.caught
        return caught.name if caught else None


class Silent(Terminal):
    """Catches signals, and prints nothing of a run."""

    def say(self, text: str) -> None:
        """See Progress.say."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """See Progress.begin."""

    def part(self, note: str, metrics: dict[str, Any] | None = None) -> None:
        """See Progress.part."""


class _Bar:
    """A phase as a bar."""

    def __init__(self, what: str, total: int, done: int) -> None:
        self._bar = tqdm(total=total, initial=done, unit="step", desc=what, leave=what == "distil")

    def part(self, note: str) -> None:
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()

    def end(self) -> None:
        self._bar.close()


class _Lines:
    """A phase as lines, for logs: the first part, the last one, and one now and then.

    The first part counts for nothing in what the others take: it also makes what they share.
    """

    def __init__(self, what: str, total: int, done: int) -> None:
        self._what, self._total, self._done = what, total, done
        self._begin = time.monotonic()
        self._first, self._since = 0, 0.0  # what was done then, and when it was
        self._told = self._begin - SECONDS_A_LINE

    def part(self, note: str) -> None:
        self._done += 1
        now = time.monotonic()
        if not self._first:
            self._first, self._since = self._done, now
        if self._done < self._total and now - self._told < SECONDS_A_LINE:
            return
        self._told = now
        print(f"{self._what} {self._done}/{self._total}, {self._pace(now)}: {note}", flush=True)

    def _pace(self, now: float) -> str:
        """What a part takes, and all that are left, where more than the first says so."""
        if self._done == self._first:
            return f"the first in {_duration(now - self._begin)}"
        each = (now - self._since) / (self._done - self._first)
        left = self._total - self._done
        return f"{each:.1f} s each" + (f", about {_duration(each * left)} left" if left else "")

    def end(self) -> None:
        """Nothing is left open."""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_trained(outcome: Outcome, config: TrainConfig) -> None:
    """How a run ended, and what to do next."""
    folder = Path(shown(str(outcome.folder)))
    code = " --allow-code" if code_of(config) else ""
    again = f"opcd train --config {_quoted(folder / 'config.yaml')} --resume{code}"
    left = config.steps - outcome.steps_done
    if outcome.stopped:
        last = "" if left else ", the last: to export and score it"
        print(
            f"stopped by {outcome.stopped} after step {outcome.steps_done}{last}; checkpoint "
            f"saved. Continue:\n  {again}"
        )
        return
    if outcome.evaluation is not None:
        show_scorecard(outcome.evaluation)
    report = f"  report       {folder / 'report.md'}\n" if (folder / "report.md").is_file() else ""
    print(f"\n{_verdict(folder)}")
    for alarm in raised_alarms(read_metrics(folder / "metrics.jsonl")):
        print(f"  alarm        {alarm}")
    if left:
        print(f"  {left} of {config.steps} steps are left. Continue:\n    {again}")
    print(
        f"  model        {folder / 'final'}\n"
        f"{report}"
        f"  page         {folder / 'report.html'}\n"
        f"  load it      AutoModelForCausalLM.from_pretrained({str(folder / 'final')!r})\n"
        f"  try it       opcd chat {_quoted(folder)}{code}\n"
        f"  {'score again' if report else 'score it   '}  opcd eval --config "
        f"{_quoted(folder / 'config.yaml')}{code}{'' if report else ' --test_data FILE'}"
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _verdict(run: Path) -> str:
    """What has become of a run, in a line."""
    card = read_scorecard(run)
    if card is None or "verdict" not in card:
        found = read_selection(run).get("validation") or {"step": None}
        if found["step"] is None:
            known = "nothing was kept to measure on"
        elif "accuracy" in found:
            known = f"the validation data, of which {found['accuracy']:.1%} are answered right, "
        else:
            known = f"the validation data, with a gap of {found['gap']:.3f} nats a token, "
        chosen = "" if found["step"] is None else "chose the checkpoint, and there are no test data"
        return f"Trained. Whether the context was learned is not known: {known}{chosen}"
    return str(Verdict(**card["verdict"]))


def converse(models: SideBySide, message: str | None, context: str | None = None) -> None:
    """Ask all models the same: one message, or what a person types until the end of input."""
    if message is None:
        print("One message a line; an empty line ends.")
    while True:
        try:
            text = input("> ") if message is None else message
        except EOFError:
            return
        if not text.strip():
            return
        for name, answer in models.ask(text, context):
            print(f"  {name:<10} {answer}")
        if message is not None:
            return


def show_learned(outcome: Learned) -> None:
    """How a loop ended, and where its files are."""
    if outcome.stopped:
        print(f"stopped by {outcome.stopped}. Continue: the same command with --resume")
        return
    print()
    for name, column in outcome.columns.items():
        elsewhere = column["elsewhere"]
        same = f", elsewhere {elsewhere['mean']:.1%} as before" if elsewhere else ""
        right = "not judged" if column["accuracy"] is None else f"{column['accuracy']:.1%}"
        counts = "".join(f", {value:.2f} {what}" for what, value in column["counts"].items())
        print(f"  {name:<22} {right} of {column['n']}{counts}{same} ({column['meaning']})")
    taken = [row for row in outcome.rounds if row["accepted"]]
    folder = Path(shown(str(outcome.folder)))
    print(f"\n{len(taken)} of {len(outcome.rounds)} rounds accepted")
    if taken:
        last = taken[-1]["round"]
        print(f"  model        {folder / f'round-{last}' / 'run' / 'final'}")
    print(f"  report       {folder / 'report.md'}")


def show_evaluated(folder: Path, found: Evaluation) -> None:
    """A scorecard and where it was written."""
    show_scorecard(found)
    written = (folder / name for name in ("scorecard.json", "report.md", "report.html"))
    print(f"\nwritten: {', '.join(map(str, written))}")


def show_served(run: Path, found: Served) -> None:
    """What a server was measured to save, and where it was written."""
    print("\n" + "\n".join(found.lines))
    written = (run / name for name in ("serving.json", "report.md", "report.html"))
    print(f"\nwritten: {', '.join(str(file) for file in written if file.is_file())}")


def show_scorecard(found: Evaluation) -> None:
    """A scorecard and a few answers."""
    print(f"\n{scorecard_table(found.card)}\n")
    print("\n".join(f"  {fact}" for fact in scorecard_facts(found.card)))
    for name, card in found.card.get("test_sets", {}).items():
        print(f"\n{name}\n\n{scorecard_table(card)}\n")
        print("\n".join(f"  {line}" for line in set_lines(card)))
    print(f"\nTest prompts, before and after\n\n{before_after(found.answers)}")
