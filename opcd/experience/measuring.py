"""What a model reaches: on problems, without and behind an experience, and elsewhere."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opcd.config import TrainConfig
from opcd.evaluation.contenders import LoadedModel, load_for_answers
from opcd.evaluation.decoding import answer_params
from opcd.evaluation.elsewhere import answers_elsewhere
from opcd.evaluation.intervals import Difference, PerRequest, paired_difference, wilson_interval
from opcd.experience.attempts import means
from opcd.experience.contexts import ITEMS, kind_of
from opcd.experience.exercises import Ask, Exercises, check_judged
from opcd.rollouts.noise import HELD_OUT
from opcd.runtime.files import write_jsonl, write_text
from opcd.runtime.memory import release_memory
from opcd.runtime.workers import Lost, dropped
from opcd.tasks.data import Example
from opcd.tasks.messages import Message
from opcd.tasks.prepare import Setup, prepare

Placement = Literal["auto", "system", "user"]


class Measured(NamedTuple):
    """How right each attempt is, from 0 to 1; None where nobody could say."""

    values: list[float | None]
    dropped: dict[str, int]
    answers: list[str]  # all that was said
    counts: list[dict[str, float]] = []  # noqa: RUF012  # of each that was judged; of a game

    def summary(self) -> dict[str, Any]:
        """Accuracy over what could be judged, with its interval, means of counts, and no text."""
        known = [v for v in self.values if v is not None]
        accuracy = sum(known) / len(known) if known else None
        interval = wilson_interval(sum(known), len(known)) if known else None
        return {
            "accuracy": accuracy,
            "interval_95": interval,
            "n": len(known),
            "dropped": self.dropped,
            "counts": means(self.counts),
        }


class Bench:
    """Models and what they are measured on; one model in memory at a time."""

    def __init__(self, config: TrainConfig, folder: Path, exercises: Exercises) -> None:
        self.config = config
        self.exercises = exercises
        self._folder = folder
        self._held: tuple[str, LoadedModel] | None = None
        self._stand_in = folder / "no-experience.md"

    def requests(self, name: str, problems: Sequence[Example]) -> Path:
        """A file of problems, as prompts; the answers stay beside them for people."""
        path = self._folder / f"{name}.jsonl"
        rows = [
            {"messages": list(p.messages)} | ({"answer": list(p.answers)} if p.answers else {})
            for p in problems
        ]
        write_jsonl(path, rows)
        return path

    def setup(self, requests: Path, context: Path | None = None, **changed: Any) -> Setup:
        """Requests as a model sees them, alone and behind a context.

        Raises InputError for what does not fit the model.
        """
        if context is None:
            write_text(self._stand_in, "No experience yet.\n")
        kind = "" if context is None else kind_of(context)
        config = replace(
            self.config,
            context=str(context or self._stand_in),
            context_placement=placement(self.config, kind),
            prompts=str(requests),
            validation_data=None,
            test_data=None,
            test_sets={},
            held_out_share=0.0,
            scorer="exact",  # never asked: a user's own judges in a process that can be ended
            **{"elsewhere_prompts": 0, **changed},
        )
        return prepare(config)

    def model(self, name: str, setup: Setup) -> LoadedModel:
        """The model of that name, for the requests of a setup; the one before is gone."""
        if self._held is None or self._held[0] != name:
            self.release()
            self._held = name, load_for_answers(setup, name, answer_params(setup))
        return self._held[1]._replace(setup=setup)

    def release(self) -> None:
        """Free the model that is held."""
        if self._held is not None:
            self._held[1].engine.close()
            self._held = None
            release_memory()

    def measure(
        self,
        name: str,  # of the model
        requests: Path,
        problems: Sequence[Example],
        context: Path | None = None,
        judged: bool = False,  # some of it must be
    ) -> Measured:
        """What it says, as `evaluation` of the configuration draws it, judged; behind a context
        where there is one."""
        setup = self.setup(requests, context)
        model = self.model(name, setup)
        ask = Ask(model.params, HELD_OUT, prompted=context is not None)
        tried = self.exercises.tried(model, setup.task.training, problems, ask)
        if judged:
            check_judged(tried)
        return Measured(
            [None if isinstance(it.value, Lost) else it.value for it in tried],
            dropped([it.value for it in tried if isinstance(it.value, Lost)]),
            [_said(it.turns) for it in tried],
            [it.counts for it in tried if not isinstance(it.value, Lost)],
        )

    def elsewhere(self, name: str, requests: Path) -> list[list[int]]:
        """The likeliest answers to unrelated requests, which see no instruction; [] for none."""
        wanted = self.config.elsewhere_prompts
        setup = self.setup(requests, without_context="default", elsewhere_prompts=wanted)
        return answers_elsewhere(self.model(name, setup)) if setup.elsewhere else []


def _said(turns: Sequence[Message]) -> str:
    return "\n".join(turn["content"] for turn in turns if turn["role"] == "assistant")


def placement(config: TrainConfig, kind: str) -> Placement:
    """Where a context of a kind stands: as it is set, else items in front of the problem."""
    if config.context_placement != "auto":
        return config.context_placement
    return "user" if kind == ITEMS else "auto"


def more_right(one: Measured, other: Measured) -> Difference | None:
    """How much more often one is right, over what could be judged of the other; None where nothing.

    What could be judged of the other and not of the one is not right: what it says may be why.
    """
    known = any(a is not None for a in one.values)
    pairs = [
        (a or 0.0, b)
        for a, b in zip(one.values, other.values, strict=True)
        if b is not None and known
    ]
    if not pairs:
        return None
    each = [1.0] * len(pairs)
    return paired_difference(
        PerRequest([a for a, _ in pairs], each), PerRequest([b for _, b in pairs], each)
    )


def agreement(answers: Sequence[Sequence[int]], original: Sequence[Sequence[int]]) -> PerRequest:
    """Which answers are still the original's."""
    same = [float(list(a) == list(b)) for a, b in zip(answers, original, strict=True)]
    return PerRequest(same, [1.0] * len(same))
