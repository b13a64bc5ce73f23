"""What the models of a scorecard say, and what they make of each other's words.

No figure is made of it here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opcd.episodes import Episode
from opcd.evaluation.agreement import (
    Divergences,
    Gap,
    Side,
    divergences,
    gap_between,
    own_side,
    student_side,
    teacher_side,
)
from opcd.evaluation.contenders import Answer, Contender, Models, both_contenders
from opcd.evaluation.decoding import answer_params, rollout_params
from opcd.evaluation.elsewhere import Elsewhere, held_against, original_side
from opcd.evaluation.elsewhere_tasks import Results, results_of
from opcd.evaluation.leak import Revealed, context_grams, revealed
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case, spread
from opcd.teacher import SharedPrefixTeacher, teacher_of

BEFORE, AFTER = "before", "after"
# A model without the context, and with it.
CONTENDERS = {BEFORE: ("base", "prompted"), AFTER: ("distilled", "distilled_prompted")}


@dataclass
class Observed:
    """All that a scorecard is made from; where something was not asked for, nothing."""

    said: list[Answer]  # by the prompted teacher
    held_out: list[Case]  # the requests that gaps and divergences are measured on
    contenders: list[Contender] = field(default_factory=list)
    answers: dict[str, list[Answer]] = field(default_factory=dict)  # by contender
    gaps: dict[str, Gap] = field(default_factory=dict)  # before and after training
    apart: dict[str, Divergences] = field(default_factory=dict)
    elsewhere: Elsewhere | None = None
    told: dict[str, Revealed] = field(default_factory=dict)  # by contender, asked for the context
    tasks: dict[str, Results] = field(default_factory=dict)  # of lm-eval, before and after


def observe(
    setup: Setup,
    names: Mapping[str, str],  # models before and after, by name or folder
    others: Callable[[Models], Sequence[Contender]],  # who answers beside them
    progress: Progress,
) -> Observed:
    """Ask every model, one in memory at a time."""
    models = Models(setup, answer_params(setup))
    named = others(models)
    asked_elsewhere = bool(setup.elsewhere) and AFTER in names
    secret = setup.config.leak_tokens and context_grams(setup)
    parts = 1 + (4 if asked_elsewhere else 3) * len(names) + len(named)
    progress.begin("evaluate", total=parts)
    try:
        # Another machine's faults come before anything has taken long here.
        known = {one.name: one.answer(setup.task.scored) for one in named if one.remote}
        asking = _Asking(setup, names, models, progress)
        for when in names:
            asking.ask_both(when)
            asking.measure_gap(when)
            if secret:
                asking.ask_to_reveal(when)
            if setup.config.elsewhere_tasks and AFTER in names:
                asking.found.tasks[when] = results_of(models.get(names[when]))
            if asked_elsewhere:
                asking.ask_elsewhere(when)
        for contender in named:
            asking.ask(contender, known.get(contender.name))
        asking.measure_divergences()
        return asking.found
    finally:
        progress.end()
        models.close()


class _Asking:
    """Models that are asked, and what they have said so far."""

    def __init__(
        self, setup: Setup, names: Mapping[str, str], models: Models, progress: Progress
    ) -> None:
        self._setup, self._names = setup, names
        self._models, self._progress = models, progress
        config, cases = setup.config, setup.task.scored
        self._teacher_name = config.teacher or config.model
        held_out = spread(setup.task.test, config.divergence_prompts)
        said = models.get(self._teacher_name).prompted(cases)
        self.found = Observed(said, held_out)
        self._shown = teacher_side(self._teacher(), episodes_of(cases, said, held_out))
        self._own: dict[str, Side] = {}  # what each student samples itself
        self._original: Side | None = None  # the model before, elsewhere
        progress.part("prompted teacher")

    def ask_both(self, when: str) -> None:
        """A model's to every request, without the context and with it."""
        name = self._names[when]
        for contender in both_contenders(self._models, name, when, CONTENDERS[when]):
            known = contender.name == "prompted" and name == self._teacher_name
            self.ask(contender, self.found.said if known else None)
        if when == BEFORE and self._teacher_name != name:
            said, who = self.found.said, f"{Path(self._teacher_name).name}, with the context"
            self.found.contenders.append(Contender("teacher", who, lambda _: said))
            self.found.answers["teacher"] = said

    def ask(self, contender: Contender, known: list[Answer] | None = None) -> None:
        """A contender's to every request; known where they were asked for before."""
        self.found.contenders.append(contender)
        answers = known if known is not None else contender.answer(self._setup.task.scored)
        self.found.answers[contender.name] = answers
        self._progress.part(contender.name)

    def measure_gap(self, when: str) -> None:
        """What a model samples itself, and what it makes of the teacher's answers."""
        model, plan, engine, setup, _ = self._models.get(self._names[when])
        config, params = setup.config, rollout_params(setup)
        prompts = [case.prompt for case in self.found.held_out]
        self._own[when] = own_side(model, plan, engine, prompts, params, config)
        missed = student_side(model, plan, self._shown.episodes, config)
        self.found.gaps[when] = gap_between(missed, self._shown, config.temperature)

    def ask_to_reveal(self, when: str) -> None:
        """What requests to reveal the context bring out."""
        model = self._models.get(self._names[when])
        alone, prompted = CONTENDERS[when]
        asked = {alone: False} | ({prompted: True} if when == BEFORE else {})
        for who, behind in asked.items():
            answers = revealed(model, prompted=behind)
            if answers is not None:
                self.found.told[who] = answers

    def ask_elsewhere(self, when: str) -> None:
        """What a model answers where the context has no say, held against the model before."""
        model = self._models.get(self._names[when])
        if self._original is None:
            self._original = original_side(model)
        else:
            self.found.elsewhere = held_against(self._original, model)
        self._progress.part(f"elsewhere {when}")

    def measure_divergences(self) -> None:
        """How far the teacher is from what each student has sampled."""
        teacher, temperature = self._teacher(), self._setup.config.temperature
        for when, own in self._own.items():
            theirs = teacher_side(teacher, own.episodes)
            self.found.apart[when] = divergences(own, theirs, temperature)
            self._progress.part(f"divergence {when}")

    def _teacher(self) -> SharedPrefixTeacher:
        model = self._models.get(self._teacher_name).model
        return teacher_of(model, self._setup.task.prefixes, self._setup.config)


def episodes_of(
    cases: Sequence[Case], answers: Sequence[Answer], wanted: Sequence[Case]
) -> list[Episode]:
    """The answers to some of the cases, as what both models score."""
    by_case = dict(zip(map(id, cases), answers, strict=True))
    return [
        Episode.of_completion(case.prompt, answer.token_ids, answer.finish)
        for case in wanted
        for answer in [by_case[id(case)]]
    ]
