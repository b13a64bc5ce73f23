"""What a person at a terminal sees of a run, and how Ctrl-C reaches it."""

import signal
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from opcd.config import TrainConfig
from opcd.evaluation.evaluate import Evaluation
from opcd.evaluation.report import before_after, scorecard_facts, scorecard_table
from opcd.runtime.progress import Progress
from opcd.training.run import Outcome

# Ctrl-C, the end of a job, and a terminal that was closed (which Windows has no signal for).
SIGNALS = [
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if name in signal.Signals.__members__
]


class Terminal(Progress):
    """Prints what a run tells. A signal lets it finish its step; a second one kills.

    Signals are the caller's own again where the context ends.
    """

    def __init__(self, finishes_steps: bool = True) -> None:
        self._finishes_steps = finishes_steps
        self._caught: str | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._bar: Any = None

    def __enter__(self) -> "Terminal":
        if self._finishes_steps:
            for number in SIGNALS:
                if signal.getsignal(number) == signal.SIG_IGN:  # as nohup does
                    continue
                self._handlers[number] = signal.signal(number, self._catch)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def say(self, text: str) -> None:
        """See Progress.say."""
        print(text)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """See Progress.begin."""
        self._bar = tqdm(total=total, initial=done, unit="step", desc=what, leave=what == "distil")

    def part(self, note: str, metrics: dict[str, Any] | None = None) -> None:
        """See Progress.part."""
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.update()

    def end(self) -> None:
        """See Progress.end. Behind the last step nothing is left that a signal could finish."""
        self._bar.close()
        self._release()

    def stop(self) -> str | None:
        """The name of a signal that came."""
        return self._caught

    def _catch(self, number: int, _frame: Any) -> None:
        self._caught = signal.Signals(number).name
        print("\nfinishing this step, then saving (once more to stop at once)", flush=True)
        signal.signal(number, self._handlers[signal.Signals(number)])

    def _release(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def show_trained(outcome: Outcome, config: TrainConfig) -> None:
    """How a run ended, and what to do next."""
    folder = outcome.folder
    if outcome.stopped:
        last = outcome.steps_done == config.steps
        left = ", the last: to export and score it" if last else ""
        print(
            f"stopped by {outcome.stopped} after step {outcome.steps_done}{left}; checkpoint "
            f"saved. Continue:\n  opcd train --config {folder / 'config.yaml'} --resume"
        )
        return
    if outcome.evaluation is not None:
        show_scorecard(outcome.evaluation)
    report = f"  report       {folder / 'report.md'}\n" if outcome.evaluation is not None else ""
    print(
        f"\nDone. The model that no longer needs the context is {folder / 'final'}\n"
        f"{report}"
        f"  load it      AutoModelForCausalLM.from_pretrained({str(folder / 'final')!r})\n"
        f"  score again  opcd eval --config {folder / 'config.yaml'}\n"
        f"  your prompt  opcd train --help, and a config like {folder / 'config.yaml'}"
    )


def show_evaluated(folder: Path, found: Evaluation) -> None:
    """A scorecard and where it was written."""
    show_scorecard(found)
    print(f"\nwritten: {folder / 'scorecard.json'}, {folder / 'report.md'}")


def show_scorecard(found: Evaluation) -> None:
    """A scorecard and a few answers."""
    print(f"\n{scorecard_table(found.card)}\n")
    print("\n".join(f"  {fact}" for fact in scorecard_facts(found.card)))
    print(f"\nTest prompts, before and after\n\n{before_after(found.answers)}")
