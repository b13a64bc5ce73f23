"""Attempts: sampled at problems by the model as it is, or left by a server in a log."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opcd.errors import InputError
from opcd.evaluation.contenders import LoadedModel, answer
from opcd.evaluation.decoding import rollout_params
from opcd.experience.checking import Asked, Checkers, dropped
from opcd.rollouts.noise import ATTEMPTS, streams
from opcd.tasks.data import Example
from opcd.tasks.formats import read_row
from opcd.tasks.messages import Message, split_system
from opcd.tasks.records import parse_json, read_text
from opcd.tasks.task import Case

RIGHT = 1.0  # a value: anything less is in part right


@dataclass(frozen=True)
class Attempt:
    """One attempt at a problem, and how right it is."""

    problem: list[Message]
    text: str
    value: float | None  # from 0 to 1; None: nobody knows
    finish: str = "stop"  # "length": it was cut
    accepted: str = ""  # the first accepted answer, where one is known

    @property
    def right(self) -> bool:
        """Whether it is known to be right, and whole."""
        return self.value is not None and self.value >= RIGHT and self.finish == "stop"

    def as_dict(self) -> dict[str, Any]:
        """As files hold it."""
        return asdict(self)


def sampled_attempts(
    model: LoadedModel,  # its setup is of the problems
    cases: Sequence[Case],  # of the problems that are attempted
    checkers: Checkers,
    answers: Sequence[Sequence[str]],  # that are right, one list a problem
    n: int,
    round_number: int,
) -> tuple[list[Attempt], dict[str, int]]:
    """n attempts at each problem, and how many were dropped because nobody could judge them.

    The draws are a function of seed, round, problem and the attempt's number. Raises InputError
    where none of all attempts could be judged.
    """
    config, chat = model.setup.config, model.setup.chat
    prompts = [case.prompt for case in cases]
    ids = [prompt.student_ids for prompt in prompts for _ in range(n)]
    params = rollout_params(model.setup)
    numbers = streams(config.seed, ATTEMPTS - round_number, prompts, n)
    rollouts = model.engine.generate(ids, params, numbers)
    said_of = [answer(r.completion_token_ids, r.finish_reason, params, chat) for r in rollouts]
    texts = [said.text for said in said_of]
    problems = [list(case.example.messages) for case in cases]
    asked = [
        Asked(said.text, answers[i // n], said.raw, problems[i // n])
        for i, said in enumerate(said_of)
    ]
    checked = checkers.check(asked)
    lost = [said for said in checked if said.value is None]
    if len(lost) == len(checked):
        raise InputError(
            f"the checker must judge attempts, but of {len(lost)} it judged none: the first "
            f"{lost[0].why} {lost[0].detail}; correct it, or raise check_seconds"
        )
    found = [
        Attempt(
            problems[i // n],
            text,
            said.value,
            rollout.finish_reason,
            next(iter(answers[i // n]), ""),
        )
        for i, (text, rollout, said) in enumerate(zip(texts, rollouts, checked, strict=True))
        if said.value is not None
    ]
    return found, dropped(checked)


def read_log(path: str) -> tuple[list[Attempt], dict[str, int]]:
    """The attempts in a log of conversations, and how many lines were skipped, by why.

    A line is a row with a completion: ``{"messages": [..., the assistant's]}``, and if it is known
    ``"outcome"``: true, false or a number from 0 to 1. System messages are left out: the setting
    without_context takes their place. Raises InputError for a log without a line that can be read.
    """
    attempts: list[Attempt] = []
    skipped = Counter[str]()
    first = ""
    for number, line in enumerate(read_text(path, "log").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            attempts.append(_logged(line, path, number))
        except InputError as error:
            skipped["lines that hold no answered conversation"] += 1
            first = first or str(error)
    if not attempts:
        raise InputError(
            f'{path}: a log must hold conversations, a line each like {{"messages": [...], '
            f'"outcome": true}}, got none in {skipped.total()} lines; the first: {first}'
        )
    return attempts, dict(skipped)


def _logged(line: str, path: str, number: int) -> Attempt:
    source = f"{path}:{number}"
    record = parse_json(line, path, "log")
    if not isinstance(record, dict):
        raise InputError(f"{source}: must be an object, got {type(record).__name__}")
    outcome = record.pop("outcome", None)
    if not (outcome is None or (isinstance(outcome, (bool, int, float)) and 0 <= outcome <= 1)):
        raise InputError(
            f"{source}: outcome must be true, false or a number from 0 to 1, got {outcome!r:.40}"
        )
    row = read_row(record, source, {"completion"})
    problem = split_system(row.messages)[1]
    if not row.completion or not problem or row.calls:
        raise InputError(f"{source}: the assistant's answer must be a text, got none")
    return Attempt(problem, row.completion, None if outcome is None else float(outcome))


def problems_of(attempts: Sequence[Attempt], source: str) -> list[Example]:
    """Each problem that was attempted, once."""
    distinct = {json.dumps(a.problem, sort_keys=True): a.problem for a in attempts}
    return [Example(tuple(problem), (), source) for problem in distinct.values()]


def read_attempts(rows: Sequence[dict[str, Any]]) -> list[Attempt]:
    """From what `Attempt.as_dict` gave."""
    return [Attempt(**row) for row in rows]


def summary(attempts: Sequence[Attempt], lost: dict[str, int]) -> dict[str, Any]:
    """Counts without texts."""
    known = [a for a in attempts if a.value is not None]
    return {
        "attempts": len(attempts) + sum(lost.values()),
        "judged": len(known),
        "right": sum(a.right for a in attempts),
        "dropped": lost,
    }
