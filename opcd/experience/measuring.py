"""What a model reaches: on problems, without and behind an experience, and elsewhere."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opcd.config import TrainConfig
from opcd.evaluation.contenders import LoadedModel, load_for_answers
from opcd.evaluation.elsewhere import answers_elsewhere
from opcd.evaluation.intervals import Difference, PerRequest, paired_difference, wilson_interval
from opcd.experience.checking import Asked, Checkers, dropped
from opcd.experience.contexts import ITEMS, kind_of
from opcd.runtime.files import write_jsonl, write_text
from opcd.runtime.memory import release_memory
from opcd.tasks.data import Example
from opcd.tasks.prepare import Setup, prepare

Placement = Literal["auto", "system", "user"]


class Measured(NamedTuple):
    """How right each answer is, from 0 to 1; None where the checker did not say."""

    values: list[float | None]
    dropped: dict[str, int]
    answers: list[str]

    def summary(self) -> dict[str, Any]:
        """Accuracy over the answers that could be judged, with its interval, and no text."""
        known = [v for v in self.values if v is not None]
        accuracy = sum(known) / len(known) if known else None
        interval = wilson_interval(sum(known), len(known)) if known else None
        return {
            "accuracy": accuracy,
            "interval_95": interval,
            "n": len(known),
            "dropped": self.dropped,
        }


class Bench:
    """Models and what they are measured on; one model in memory at a time."""

    def __init__(self, config: TrainConfig, folder: Path, checkers: Checkers) -> None:
        self.config = config
        self.checkers = checkers
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
            self._held = name, load_for_answers(setup, name)
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
    ) -> Measured:
        """The likeliest answers, judged; behind a context where there is one."""
        setup = self.setup(requests, context)
        model, cases = self.model(name, setup), setup.task.training
        answers = (model.alone if context is None else model.prompted)(cases)
        asked = [
            Asked(answer.text, problem.answers, answer.raw, problem.messages)
            for answer, problem in zip(answers, problems, strict=True)
        ]
        found = self.checkers.check(asked)
        return Measured([c.value for c in found], dropped(found), [a.text for a in answers])

    def elsewhere(self, name: str, requests: Path) -> list[list[int]]:
        """The likeliest answers to unrelated requests, which see no instruction; [] for none."""
        wanted = self.config.elsewhere_prompts
        setup = self.setup(requests, without_context="default", elsewhere_prompts=wanted)
        return answers_elsewhere(self.model(name, setup)) if setup.elsewhere else []


def placement(config: TrainConfig, kind: str) -> Placement:
    """Where a context of a kind stands: as it is set, else items in front of the problem."""
    if config.context_placement != "auto":
        return config.context_placement
    return "user" if kind == ITEMS else "auto"


def more_right(one: Measured, other: Measured) -> Difference | None:
    """How much more often one is right, over what could be judged of both; None where nothing."""
    pairs = [
        (a, b)
        for a, b in zip(one.values, other.values, strict=True)
        if a is not None and b is not None
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
