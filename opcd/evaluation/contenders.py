"""Who answers the requests of a scorecard."""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opcd.episodes import Prompt
from opcd.evaluation.decoding import greedy_params
from opcd.models.adapter import is_adapter, load_adapter
from opcd.passes.plan import Plan, find_plan
from opcd.rollouts.choice import build_engine
from opcd.rollouts.noise import HELD_OUT, streams
from opcd.rollouts.protocol import RolloutEngine, SamplingParams
from opcd.tasks.chat import Chat
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
    without: str = ""  # of one that sees the context, the name of the same model without it
    remote: bool = False  # on another machine: needs no memory here, and may fail by itself


class LoadedModel(NamedTuple):
    """A model that answers, and what samples from it."""

    model: Any
    plan: Plan
    engine: RolloutEngine
    setup: Setup
    params: SamplingParams  # of its answers

    def alone(self, cases: Sequence[Case]) -> list[Answer]:
        """Answers without the context."""
        return answers_alone(self.engine, cases, self.params, self.setup)

    def prompted(self, cases: Sequence[Case]) -> list[Answer]:
        """Answers behind the context; requests with the same one share its prefix."""
        return prompted_answers(self.engine, cases, self.params, self.setup)

    def answers(
        self, prompt_ids: Sequence[Sequence[int]], of: Sequence[Prompt] | None = None
    ) -> list[Answer]:
        """Answers to whole prompts; drawn as those to `of` are, the requests of the task."""
        asked = of if of is not None else [Prompt([*ids], [*ids]) for ids in prompt_ids]
        numbers = streams(self.setup.config.seed, HELD_OUT, asked)
        return answers_of(self.engine, prompt_ids, numbers, self.params, self.setup)


class Models:
    """Those that answer, by their names or folders; one in memory at a time."""

    def __init__(self, setup: Setup, params: SamplingParams | None = None) -> None:
        self._setup = setup
        self._params = params
        self._held: tuple[str, LoadedModel] | None = None

    def get(self, name: str) -> LoadedModel:
        """The model of that name; the one before is gone."""
        if self._held is None or self._held[0] != name:
            self.close()
            self._held = name, load_for_answers(self._setup, name, self._params)
        return self._held[1]

    def close(self) -> None:
        """Free what is held."""
        if self._held is not None:
            self._held[1].engine.close()
            self._held = None
            gc.collect()  # engines and wrappers refer to each other


def load_for_answers(setup: Setup, name: str, params: SamplingParams | None = None) -> LoadedModel:
    """A model by its name or folder, or an adapter's folder on the base, ready to answer; with the
    likeliest tokens, unless otherwise drawn."""
    config = setup.config
    if is_adapter(Path(name)):
        model = load_adapter(setup.load(config.model), Path(name))
    else:
        model = setup.load(name)
    plan = find_plan(model, setup.task.a_prefix)
    engine = build_engine(
        config.rollout_engine, model, config.rollout_batch_size, plan, config.max_tokens_per_pass
    )
    return LoadedModel(model, plan, engine, setup, params or greedy_params(setup))


def both_contenders(
    models: Models,
    model: str,  # its name or folder; it is loaded when it is asked
    when: str,  # "before" or "after"
    names: tuple[str, str],
) -> list[Contender]:
    """A model without the context, and with it."""
    return [
        Contender(names[0], f"{when}, without the context", lambda c: models.get(model).alone(c)),
        Contender(
            names[1],
            f"{when}, with the context",
            lambda c: models.get(model).prompted(c),
            without=names[0],
        ),
    ]


def prompted_answers(
    engine: RolloutEngine, cases: Sequence[Case], params: SamplingParams, setup: Setup
) -> list[Answer]:
    """Answers behind the context, a context at a time: those share its prefix."""
    by_context: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        by_context.setdefault(case.prompt.context, []).append(i)
    numbers = streams(setup.config.seed, HELD_OUT, [case.prompt for case in cases])
    found: dict[int, Answer] = {}
    for members in by_context.values():
        ids = [setup.task.prompted_ids(cases[i].prompt) for i in members]
        said = answers_of(engine, ids, [numbers[i] for i in members], params, setup)
        found.update(zip(members, said, strict=True))
    return [found[i] for i in range(len(cases))]


def answers_alone(
    engine: RolloutEngine, cases: Sequence[Case], params: SamplingParams, setup: Setup
) -> list[Answer]:
    """Answers without the context."""
    prompts = [case.prompt for case in cases]
    numbers = streams(setup.config.seed, HELD_OUT, prompts)
    return answers_of(engine, [prompt.student_ids for prompt in prompts], numbers, params, setup)


def answers_of(
    engine: RolloutEngine,
    prompt_ids: Sequence[Sequence[int]],
    numbers: Sequence[int],  # what each draws by: the same for every contender
    params: SamplingParams,
    setup: Setup,
) -> list[Answer]:
    """Completions, decoded. Where they are the likeliest ones, equal prompts are answered once."""
    asked = [*zip(map(tuple, prompt_ids), numbers, strict=True)]
    if params.temperature == 0:
        asked = [(ids, 0) for ids, _ in asked]
    distinct = [*dict.fromkeys(asked)]
    rollouts = engine.generate([ids for ids, _ in distinct], params, [n for _, n in distinct])
    said = {
        question: answer(rollout.completion_token_ids, rollout.finish_reason, params, setup.chat)
        for question, rollout in zip(distinct, rollouts, strict=True)
    }
    return [said[question] for question in asked]


def answer(ids: list[int], finish: str, params: SamplingParams, chat: Chat) -> Answer:
    """A completion as text, which ends in front of a stop string; its tokens do not."""
    cut = params.stop.cut if params.stop is not None else str
    return Answer(chat.decode(ids, cut), ids, finish, cut(chat.decode_raw(ids)))
