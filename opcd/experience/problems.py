"""Tasks with answers: problems in three parts, which nothing but their own words decides."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.contenders import LoadedModel, answers_of
from opcd.experience.attempts import Attempt, by_problem, problems_of, read_log
from opcd.experience.checking import Asked, Checkers
from opcd.experience.exercises import Ask, Tried
from opcd.experience.items import PLACES, PROMPT, request_for_items
from opcd.experience.settings import Settings
from opcd.rollouts.noise import streams
from opcd.scoring.scorers import load_scorer
from opcd.tasks.data import (
    NO_CONTEXT,
    Example,
    check_disjoint,
    check_same_answers,
    read_examples,
    request_of,
)
from opcd.tasks.held_out import Parts
from opcd.tasks.messages import assistant
from opcd.tasks.replay import check_replay_apart
from opcd.tasks.task import Case
from opcd.training.sources import MakeSource


class Problems:
    """Problems that a checker judges; see `Exercises`. Of a log, those that it was asked.

    Raises InputError for what `read_log` and `read_problems` refuse.
    """

    request, places = PROMPT, PLACES
    logged: tuple[list[Attempt], dict[str, int]] | None

    def __init__(self, settings: Settings) -> None:
        training, experience = settings.training, settings.experience
        logged = read_log(settings.log) if settings.log is not None else None
        asked = problems_of(logged[0], settings.log or "") if logged else None
        self.parts = read_problems(training, asked)
        held_out = {"validation": self.parts.validation, "test": self.parts.test}
        check_replay_apart(training, held_out)  # which a round's training does not see
        self.logged = _without_held_out(*logged, self.parts) if logged else None
        self.changes: dict[str, Any] = {}
        self._checkers = Checkers(training.scorer, experience.check_seconds)
        self._most_requests = experience.problems_per_round

    def __enter__(self) -> "Problems":
        self._checkers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._checkers.close()

    def tried(
        self, model: LoadedModel, cases: Sequence[Case], exercises: Sequence[Example], ask: Ask
    ) -> list[Tried]:
        """See Exercises.tried."""
        task, prompts = model.setup.task, [case.prompt for case in cases]
        numbers = streams(model.setup.config.seed, ask.step, prompts, ask.times)
        asked = [
            task.prompted_ids(prompt) if ask.prompted else prompt.student_ids
            for prompt in prompts
            for _ in range(ask.times)
        ]
        said = answers_of(model.engine, asked, numbers, ask.params, model.setup)
        problems = [problem for problem in exercises for _ in range(ask.times)]
        values = self._checkers.check(
            [
                Asked(answer.text, problem.answers, answer.raw, problem.messages)
                for answer, problem in zip(said, problems, strict=True)
            ]
        )
        return [
            Tried([assistant(answer.text)], value, answer.finish)
            for answer, value in zip(said, values, strict=True)
        ]

    def item_requests(self, attempts: Sequence[Attempt], request: str, reward: bool) -> list[str]:
        """See Exercises.item_requests. One attempt at each, the newest of a log."""
        chosen = [of_one[0] for of_one in by_problem(attempts)][-self._most_requests :]
        return [request_for_items(request, attempt, reward) for attempt in chosen]

    def source(self, exercises: Sequence[Example]) -> MakeSource | None:
        """See Exercises.source: completions."""
        return None


def _without_held_out(
    attempts: list[Attempt], skipped: dict[str, int], parts: Parts
) -> tuple[list[Attempt], dict[str, int]]:
    """The attempts at problems that may be learned from."""
    known = {request_of(problem) for problem in parts.train}
    found = [a for a in attempts if request_of(Example(tuple(a.problem), (), "")) in known]
    left_out = len(attempts) - len(found)
    return found, skipped | ({"at validation or test problems": left_out} if left_out else {})


def read_problems(config: TrainConfig, logged: Sequence[Example] | None = None) -> Parts:
    """The problems to learn from, those to choose by, and those that are looked at once.

    Rows have the forms of evaluation data. Without validation_data and test_data named, both are
    taken from prompts. logged: problems of a log, which take the place of those to learn from; what
    is a validation or test problem as well, holds one among its turns, or stands among one's, is
    left out of them.

    Raises InputError for rows without answers, training problems that hold others among their
    turns or stand among theirs, equal problems with different answers, answers that the checker can
    never find right, system messages, and a part without a problem.
    """
    named = [path for path in (config.validation_data, config.test_data) if path]
    if len(named) == 1 or (logged is not None and not named):
        raise InputError(
            f"validation_data and test_data must both be named{', with a log' if logged else ''}, "
            f"got {len(named)} of them; name files of problems with answers"
            + ("" if logged else ", or leave both out: a share of the problems is then kept out")
        )
    if logged is None and config.prompts is None:
        raise InputError("there must be problems, got none; name a file as prompts")
    if logged is None:
        found = [_read(path) for path in (str(config.prompts), *named)]
        parts = Parts(*found) if named else split(found[0], config.held_out_share)
        check_disjoint(parts._asdict(), {"": NO_CONTEXT})
        if shows := _showing(parts.train, parts):
            raise InputError(
                f"{shows[0].source}: a training problem must not hold a validation or test problem "
                f"among its turns, which a demonstration would show, got {len(shows)} that do; "
                f"remove them, or the problems that they hold"
            )
        if held := _held_by(parts.train, parts):
            raise InputError(
                f"{held[0].source}: a training problem must not stand among the turns of a "
                f"validation or test problem, behind which it may be shown, got {len(held)} that "
                f"do; remove them, or the problems that hold them"
            )
    else:
        held_out = [_read(path) for path in named]
        check_disjoint({"validation": held_out[0], "test": held_out[1]}, {"": NO_CONTEXT})
        parts = Parts([], *held_out)
        left_out = {id(p) for p in [*_showing(logged, parts), *_held_by(logged, parts)]}
        parts = parts._replace(train=[p for p in logged if id(p) not in left_out])
    for name, part in parts._asdict().items():
        if not part:
            raise InputError(
                f"each part of the problems must hold some, got none for {name} of "
                f"{sum(map(len, parts))}; add problems, or change held_out_share"
            )
    judged = [*parts.validation, *parts.test, *(parts.train if logged is None else [])]
    check_same_answers(judged)
    _check_answers(judged, config.scorer)
    for problem in judged:
        if problem.own_system:
            raise InputError(
                f"{problem.source}: a problem must not have a system message of its own, which "
                f"would stand between experience and problem; write one that all share as "
                f"without_context, or put it into the request"
            )
    return parts


def _showing(problems: Sequence[Example], parts: Parts) -> list[Example]:
    """Those in whose conversations a validation or test problem stands, as `check_disjoint` finds
    it in demonstrations."""
    held_out = [*parts.validation, *parts.test]
    known = {request_of(problem)[1] for problem in held_out}
    sizes = {len(problem.messages) for problem in held_out}

    def shows(problem: Example) -> bool:
        turns = problem.messages
        return any(
            request_of(replace(problem, messages=turns[end - size : end]))[1] in known
            for end in range(1, len(turns) + 1)
            for size in sizes
            if size <= end
        )

    return [problem for problem in problems if shows(problem)]


def _held_by(problems: Sequence[Example], parts: Parts) -> list[Example]:
    """Those that stand in front of the last turn of a validation or test problem."""
    sizes = {len(problem.messages) for problem in problems}
    known = {
        request_of(replace(held, messages=held.messages[end - size : end]))[1]
        for held in (*parts.validation, *parts.test)
        for end in range(1, len(held.messages))
        for size in sizes
        if size <= end
    }
    return [problem for problem in problems if request_of(problem)[1] in known]


def split(problems: Sequence[Example], held_out_share: float) -> Parts:
    """Problems in their parts, validation and test with half of `held_out_share` each.

    The part of a problem is a function of its words alone, as they are compared: one that is added
    moves no other, and spellings of the same one stay together.
    """
    parts: tuple[list[Example], list[Example], list[Example]] = [], [], []
    for problem in problems:
        place = _place(problem)
        part = 0 if place >= held_out_share else 1 if place < held_out_share / 2 else 2
        parts[part].append(problem)
    return Parts(*parts)


def _place(problem: Example) -> float:
    """A number in [0, 1) that belongs to a problem's words."""
    return place_of(repr(request_of(problem)))


def place_of(text: str) -> float:
    """A number in [0, 1) that belongs to a text."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _read(path: str) -> list[Example]:
    problems, _ = read_examples(path, True, {"": NO_CONTEXT})
    return problems


def _check_answers(problems: Sequence[Example], spec: str) -> None:
    """Raise InputError for an answer that can never be found right.

    A user's function is not asked here, where nobody would end it.
    """
    scorer = load_scorer(spec)
    if scorer.hears_teacher:
        raise InputError(
            f"checker {spec} must judge an attempt by itself, got one that names teacher_answer, "
            f"and there is no prompted teacher; leave that parameter out"
        )
    for problem in problems:
        if scorer.needs_answers and not problem.answers:
            raise InputError(
                f"{problem.source}: checker {spec} compares with answers, got a problem without; "
                f'add "answer" to each, or write a function that needs none'
            )
        for answer in problem.answers:
            if scorer.fault and (fault := scorer.fault(answer)):
                raise InputError(
                    f"{problem.source}: checker {spec} must be able to find the answer "
                    f"{answer!r} right, but {fault}"
                )
