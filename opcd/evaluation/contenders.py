"""Who answers the requests of a scorecard."""

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from opcd.passes.plan import Plan, find_plan
from opcd.rollouts.choice import build_engine
from opcd.rollouts.protocol import RolloutEngine, SamplingParams
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case


class Answer(NamedTuple):
    """What a contender says to one request."""

    text: str
    token_ids: list[int]
    finish: str  # "stop" or "length"
    raw: str  # the text with its special tokens

    @property
    def tokens(self) -> int:
        """How long it is."""
        return len(self.token_ids)


class Contender(NamedTuple):
    """A row of the scorecard: anything that answers requests."""

    name: str
    meaning: str  # for people
    answer: Callable[[Sequence[Case]], list[Answer]]


class LoadedModel(NamedTuple):
    """A model that answers greedily, and what samples from it."""

    model: Any
    plan: Plan
    engine: RolloutEngine
    setup: Setup

    def alone(self, cases: Sequence[Case]) -> list[Answer]:
        """Answers without the context."""
        return self.answers([c.prompt.student_ids for c in cases])

    def prompted(self, cases: Sequence[Case]) -> list[Answer]:
        """Answers behind the context; requests with the same one share its prefix."""
        return prompted_answers(self.engine, cases, self.setup)

    def answers(self, prompt_ids: Sequence[Sequence[int]]) -> list[Answer]:
        """Answers to whole prompts."""
        return greedy_answers(self.engine, prompt_ids, self.setup)


class Models:
    """Those that answer, by their names or folders; one in memory at a time."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._held: tuple[str, LoadedModel] | None = None

    def get(self, name: str) -> LoadedModel:
        """The model of that name; the one before is gone."""
        if self._held is None or self._held[0] != name:
            self.close()
            self._held = name, load_for_answers(self._setup, name)
        return self._held[1]

    def close(self) -> None:
        """Free what is held."""
        if self._held is not None:
            self._held[1].engine.close()
            self._held = None
            gc.collect()  # engines and wrappers refer to each other


def load_for_answers(setup: Setup, name: str) -> LoadedModel:
    """A model by its name or folder, ready to answer."""
    config = setup.config
    model = setup.load(name)
    plan = find_plan(model, setup.task.a_prefix)
    engine = build_engine(
        config.rollout_engine, model, config.rollout_batch_size, plan, config.max_tokens_per_pass
    )
    return LoadedModel(model, plan, engine, setup)


def both_contenders(
    models: Models,
    model: str,  # its name or folder; it is loaded when it is asked
    when: str,  # "before" or "after"
    names: tuple[str, str],
) -> list[Contender]:
    """A model without the context, and with it."""
    return [
        Contender(names[0], f"{when}, without the context", lambda c: models.get(model).alone(c)),
        Contender(names[1], f"{when}, with the context", lambda c: models.get(model).prompted(c)),
    ]


def prompted_answers(engine: RolloutEngine, cases: Sequence[Case], setup: Setup) -> list[Answer]:
    """The likeliest completions behind the context, a context at a time: those share its prefix."""
    by_context: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        by_context.setdefault(case.prompt.context, []).append(i)
    found: dict[int, Answer] = {}
    for members in by_context.values():
        ids = [setup.task.prompted_ids(cases[i].prompt) for i in members]
        found.update(zip(members, greedy_answers(engine, ids, setup), strict=True))
    return [found[i] for i in range(len(cases))]


def greedy_answers(
    engine: RolloutEngine, prompt_ids: Sequence[Sequence[int]], setup: Setup
) -> list[Answer]:
    """The likeliest completions, decoded; equal prompts are answered once."""
    distinct = {tuple(ids): i for i, ids in enumerate(dict.fromkeys(map(tuple, prompt_ids)))}
    params = SamplingParams(setup.config.max_completion_tokens, temperature=0.0)
    rollouts = engine.generate([*distinct], params)
    answers = [
        Answer(
            setup.chat.decode(rollout.completion_token_ids),
            rollout.completion_token_ids,
            rollout.finish_reason,
            setup.chat.decode_raw(rollout.completion_token_ids),
        )
        for rollout in rollouts
    ]
    return [answers[distinct[tuple(ids)]] for ids in prompt_ids]
