"""What a model is set to learn from: problems that a checker judges, or games that it plays.

The loop knows exercises by how they begin, and by what came of an attempt. A game is one whose
answer is not given at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from opcd.errors import InputError
from opcd.evaluation.contenders import LoadedModel
from opcd.evaluation.decoding import rollout_params
from opcd.experience.attempts import Attempt
from opcd.rollouts.noise import ATTEMPTS
from opcd.rollouts.protocol import SamplingParams
from opcd.runtime.workers import Lost, dropped
from opcd.tasks.data import Example
from opcd.tasks.held_out import Parts
from opcd.tasks.messages import Message
from opcd.tasks.task import Case
from opcd.training.sources import MakeSource


class Ask(NamedTuple):
    """How exercises are attempted."""

    params: SamplingParams
    step: int  # of the draws, see `rollouts.noise`
    times: int = 1  # each
    prompted: bool = False  # with the experience in view


class Tried(NamedTuple):
    """What came of one attempt."""

    turns: list[Message]  # what was said behind the problem, the model's first
    value: float | Lost  # how right it is, from 0 to 1
    finish: str = "stop"  # "length": some of it was cut
    counts: dict[str, float] = {}  # noqa: RUF012  # of a tuple: never changed


class Exercises(Protocol):
    """Exercises in three parts, and who says how right an attempt is; a context manager.

    Entering starts what judges, in processes of its own, and raises InputError for what a user gave
    that cannot be used.
    """

    parts: Parts
    logged: tuple[list[Attempt], dict[str, int]] | None  # in place of attempts; left out, by why
    request: Path  # the file that asks for items
    places: frozenset[str]  # what such a file must hold, to be filled in
    changes: dict[str, Any]  # to the configuration of a training run

    def __enter__(self) -> "Exercises": ...

    def __exit__(self, *_: object) -> None: ...

    def tried(
        self, model: LoadedModel, cases: Sequence[Case], exercises: Sequence[Example], ask: Ask
    ) -> list[Tried]:
        """What comes of attempts at exercises, which `cases` are as the model sees them; those of
        one together."""
        ...

    def item_requests(self, attempts: Sequence[Attempt], request: str, reward: bool) -> list[str]:
        """Requests to write down what attempts teach; `reward`: whether the model is told which of
        them were right."""
        ...

    def source(self, exercises: Sequence[Example]) -> MakeSource | None:
        """What a run trains on whose prompts these are; None: completions of them."""
        ...


def check_judged(tried: Sequence[Tried]) -> None:
    """Raise InputError where nobody could judge any of them."""
    lost = [it.value for it in tried if isinstance(it.value, Lost)]
    if len(lost) == len(tried):
        raise InputError(
            f"attempts must be judged, but of {len(lost)} none was; the first: {lost[0]}; correct "
            f"what judges them, or raise check_seconds"
        )


def sampled_attempts(
    exercises: Exercises,
    model: LoadedModel,  # its setup is of the problems
    problems: Sequence[Example],
    times: int,  # each
    round_number: int,
) -> tuple[list[Attempt], dict[str, int]]:
    """Attempts at problems, and how many were dropped because nobody could judge them.

    The draws are a function of seed, round, problem and the attempt's number. Raises InputError
    where none of all attempts could be judged.
    """
    ask = Ask(rollout_params(model.setup), ATTEMPTS - round_number, times)
    tried = exercises.tried(model, model.setup.task.training, problems, ask)
    check_judged(tried)
    lost = [it.value for it in tried if isinstance(it.value, Lost)]
    each = [problem for problem in problems for _ in range(times)]
    found = [
        Attempt(
            list(problem.messages),
            it.turns,
            it.value,
            it.finish,
            next(iter(problem.answers), ""),
            it.counts,
        )
        for it, problem in zip(tried, each, strict=True)
        if not isinstance(it.value, Lost)
    ]
    return found, dropped(lost)
