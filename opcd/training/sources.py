"""What a step trains on, and how each episode is scored."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import TypeVar

from opcd.config import TrainConfig
from opcd.episodes import Episode, Prompt
from opcd.rollouts.protocol import RolloutEngine, SamplingParams, complete
from opcd.tasks.order import step_rows
from opcd.tasks.prepare import Setup
from opcd.teacher import SharedPrefixTeacher
from opcd.training.guided import GuidedCompletions

T = TypeVar("T")
Conversation = Sequence[Prompt]  # the prompts of one row, in order

BATCHES_AHEAD = 4  # of rollout_batch_size, that guided completions are made for at once


class Source(ABC):
    """Where the episodes of a step come from."""

    @abstractmethod
    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        """Those of step number `step`, from 0; `sampler` draws from the student as it is now."""

    def figures(self) -> dict[str, float]:
        """What else is known of the last step's, by names for metrics."""
        return {}


# A source that somebody else brings, for the rows of a setup.
MakeSource = Callable[[Setup, SharedPrefixTeacher], Source]


class OnPolicy(Source):
    """The student's own completions of the training prompts."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        config: TrainConfig,
        params: SamplingParams,  # of training
    ) -> None:
        self._conversations = conversations
        self._config = config
        self._params = params

    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        """See Source.episodes."""
        chosen = step_rows(self._conversations, step, self._config)
        return own_episodes(prompts_of(chosen), step, sampler, self._config, self._params)


class PartlyGuided(Source):
    """The student's own completions, and for a share of a step's conversations somebody else's.

    Plain on-policy training teaches nothing about what the student never samples; here the prompted
    teacher shows it.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        config: TrainConfig,
        params: SamplingParams,  # of training
        completions: GuidedCompletions,
    ) -> None:
        self._conversations = conversations
        self._config = config
        self._params = params
        self._completions = completions

    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        """See Source.episodes. Guided ones come last."""
        config, n = self._config, self._config.completions_per_prompt
        own, guided = map(prompts_of, parted(self._conversations, step, config))
        self._completions.prepare(guided, lambda: self._ahead(step))
        shown = [
            scored_as(self._completions.episode(prompt, sample, epoch), "guided", config)
            for conversation, epoch in parted_by_epoch(self._conversations, step, config)[1]
            for prompt in conversation
            for sample in range(n)
        ]
        said = own_episodes(own, step, sampler, config, self._params) if own else []
        return [*said, *shown]

    def _ahead(self, step: int) -> list[Prompt]:
        """The guided prompts from this step on: a large batch."""
        wanted: list[Prompt] = []
        count = BATCHES_AHEAD * self._config.rollout_batch_size
        for later in range(step, self._config.steps):
            wanted += prompts_of(parted(self._conversations, later, self._config)[1])
            if len(wanted) >= count:
                break
        return wanted


class WithReplay(Source):
    """A task's episodes, and the student's own completions of prompts that are none of it.

    Those stand behind no context for the teacher either: what is minimised there is how far the
    student is from the original model.
    """

    def __init__(
        self,
        task: Source | None,  # of the other prompts of a step; None where all are replayed
        prompts: Sequence[Prompt],  # see `tasks.replay`
        config: TrainConfig,  # of the run
        params: SamplingParams,  # of replayed prompts
    ) -> None:
        self._task = task
        self._rows = [[prompt] for prompt in prompts]
        self._params = params
        self._config = replace(config, prompts_per_step=config.replayed)

    def figures(self) -> dict[str, float]:
        """See Source.figures."""
        return self._task.figures() if self._task is not None else {}

    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        """See Source.episodes. Those that are replayed come last."""
        own = self._task.episodes(step, sampler) if self._task is not None else []
        prompts = prompts_of(step_rows(self._rows, step, self._config))
        again = own_episodes(prompts, step, sampler, self._config, self._params)
        return [*own, *(replace(episode, origin="replay") for episode in again)]


class Recorded(Source):
    """Conversations whose assistant turns are scored as they were recorded; nothing is sampled."""

    def __init__(self, conversations: Sequence[Sequence[Episode]], config: TrainConfig) -> None:
        self._conversations = conversations
        self._config = config

    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        """See Source.episodes."""
        chosen = step_rows(self._conversations, step, self._config)
        return [scored_as(e, "recorded", self._config) for e in chain.from_iterable(chosen)]


def parted(rows: Sequence[T], step: int, config: TrainConfig) -> tuple[list[T], list[T]]:
    """The student's rows of a step, and the guided ones, spread over it and over steps."""
    own, guided = parted_by_epoch(rows, step, config)
    return [row for row, _ in own], [row for row, _ in guided]


def parted_by_epoch(
    rows: Sequence[T], step: int, config: TrainConfig
) -> tuple[list[tuple[T, int]], list[tuple[T, int]]]:
    """As `parted`, each row with the number of its epoch."""
    found = step_rows(rows, step, config)
    share, first = config.guided_share, step * len(found)
    chosen = [(row, (first + i) // len(rows)) for i, row in enumerate(found)]
    counts = [int(share * (first + i)) for i in range(len(chosen) + 1)]
    marks = [after - before for before, after in pairwise(counts)]
    own = [row for row, mark in zip(chosen, marks, strict=True) if not mark]
    return own, [row for row, mark in zip(chosen, marks, strict=True) if mark]


def prompts_of(conversations: Sequence[Conversation]) -> list[Prompt]:
    """Those of all, one conversation behind the other."""
    return [*chain.from_iterable(conversations)]


def own_episodes(
    prompts: Sequence[Prompt],
    step: int,
    sampler: RolloutEngine,
    config: TrainConfig,
    params: SamplingParams,
) -> list[Episode]:
    """The student's completions of a step's prompts."""
    n = config.completions_per_prompt
    episodes = complete(sampler, prompts, params, config.seed, step, n)
    return [scored_as(episode, "student", config) for episode in episodes]


def scored_as(episode: Episode, origin: str, config: TrainConfig) -> Episode:
    """The one place that says which episode is scored how."""
    if origin == "student":
        return replace(episode, forward_share=config.forward_share)
    if config.guided_objective == "cross_entropy":
        return replace(episode, origin=origin, divergence_weight=0.0, likelihood_weight=1.0)
    return replace(episode, origin=origin, forward_share=1.0)
