"""What models make of a sample, in numbers: of answers and gaps made by hand."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.evaluation.agreement import Gap
from opcd.evaluation.contenders import Answer
from opcd.evaluation.intervals import PerRequest
from opcd.preflight.measure import Alone, beyond_spread, summarised
from opcd.preflight.verdict import Measured
from opcd.tasks.prepare import Setup, prepare
from tests.conftest import write_jsonl

LIKELY, RARE = math.log(0.5), math.log(0.001)


def answers(*texts: str, finish: str = "stop") -> list[Answer]:
    return [Answer(text, [70 + i for i in range(len(text))] + [1], finish, text) for text in texts]


def gap(missed: Sequence[list[float]], logprobs: Sequence[list[float]] | None = None) -> Gap:
    counts = [len(nats) for nats in missed]
    logprobs = [[LIKELY] * n for n in counts] if logprobs is None else logprobs
    nats = PerRequest([sum(nats) for nats in missed], counts)
    return Gap(nats, PerRequest([0.0] * len(missed), counts), [*missed], [*logprobs])


def looked_at(setup: Setup, said: list[Answer], *models: Alone) -> Measured:
    student, teacher = models[0], models[-1]
    return summarised(setup, setup.task.validation, said, teacher, student)


@pytest.fixture
def setup(settings: dict) -> Setup:
    """Requests for a, p and f."""
    return prepare(TrainConfig(**settings))


NOTHING = [[0.0, 0.0]] * 3


def test_answers_that_the_prompt_changes_and_mends(setup: Setup) -> None:
    said = answers("a", "p", "x")
    found = looked_at(setup, said, Alone(answers("z", "p", "f"), gap(NOTHING)))
    assert found.requests == 3
    assert found.changed == pytest.approx(2 / 3)
    assert found.changed_interval[0] < 2 / 3 < found.changed_interval[1]
    assert (found.base, found.prompted, found.unprompted) == (2 / 3, 2 / 3, None)
    assert found.gain is not None
    assert (found.gain.mean, found.gain.requests) == (0, 3)
    assert found.constant is None, "three classes of three"
    assert found.tokens == 2


def test_what_is_missed_is_the_teachers_share_of_it(setup: Setup) -> None:
    """A token that both find unlikely is none that the student misses."""
    said = answers("ab", "ab", "ab")
    missed = [[0.1, 1.9, 0.0]] * 2 + [[0.1, 1.6, 0.0]]
    logprobs = [[-9.0, -2.0, LIKELY]] * 2 + [[-9.0, math.log(0.3), LIKELY]]
    found = looked_at(setup, said, Alone(said, gap(missed, logprobs)))
    assert found.missed_at == setup.tokenizer.decode([71])
    assert found.gap == pytest.approx((2 + 2 + 1.7) / 9)
    assert found.likelihood == pytest.approx([math.exp(-9), math.exp(-2), 0.5])


def test_places_that_few_answers_have_are_left_out(setup: Setup) -> None:
    logprobs = [[LIKELY] * 12, [LIKELY], [LIKELY]]
    missed = [[0.0] * len(answer) for answer in logprobs]
    said = answers("a" * 11, "", "")
    found = looked_at(setup, said, Alone(said, gap(missed, logprobs)))
    assert found.likelihood == [0.5]
    assert found.empty == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("missed", "logprobs", "unmet", "hard"),
    [
        ([5.0, 4.0, 0.0], [RARE, RARE, LIKELY], 0.0, 2),  # a label
        ([5.0, 4.0, 3.0, 3.0], [RARE, RARE, LIKELY, RARE], 3 / 15, 3),
        ([3.0, 5.0, 4.0, 3.0], [LIKELY, RARE, RARE, RARE], 3 / 15, 3),  # wherever they stand
        ([5.0, 4.0, -2.0, 1.0], [RARE, RARE, RARE, RARE], 1 / 10, 4),
        ([5.0, 4.0] + [1.0] * 88 + [3.0], [RARE, RARE] + [LIKELY] * 88 + [RARE], 0.03, 3),
        ([0.0, -1.0], [RARE, RARE], 0.0, 2),
    ],
)
def test_what_own_samples_do_not_come_to(
    missed: list[float], logprobs: list[float], unmet: float, hard: int, setup: Setup
) -> None:
    said = answers(*["a" * (len(missed) - 1)] * 3)
    found = looked_at(setup, said, Alone(said, gap([missed] * 3, [logprobs] * 3)))
    assert found.unmet == pytest.approx(unmet)
    assert found.hard_tokens == hard


def test_the_prompt_is_judged_by_the_model_that_sees_it(setup: Setup) -> None:
    """The teacher says the same with and without it; the student says something else."""
    said = answers("a", "p", "f", finish="length")
    student = Alone(answers("z", "z", "z"), gap([[2.0, 2.0]] * 3))
    teacher = Alone(said, gap([[0.25, 0.0]] * 3))
    found = looked_at(setup, said, student, teacher)
    assert found.changed == 0
    assert (found.shift, found.gap) == (0.125, 2.0)
    assert (found.base, found.unprompted, found.prompted) == (0, 1, 1)
    assert found.gain is not None
    assert found.gain.mean == 0, "the student gains by the teacher, not by the prompt"
    assert found.cut == 1
    stronger = looked_at(setup, said, Alone(said, student.gap), student)
    assert stronger.gain is not None
    assert stronger.gain.mean == 0, "the student needs neither"


@pytest.mark.parametrize(
    ("words", "constant"), [("apple axe pear", 2 / 3), ("apple axe", None), ("apple pear", None)]
)
def test_one_answer_for_everything(words: str, constant: float | None, settings: dict) -> None:
    rows = [{"prompt": word, "answer": word[0]} for word in words.split()]
    write_jsonl(Path(settings["validation_data"]), rows)
    setup = prepare(TrainConfig(**settings))
    said = answers(*(word[0] for word in words.split()))
    found = looked_at(setup, said, Alone(said, gap([[0.0, 0.0]] * len(rows))))
    assert found.constant == (None if constant is None else pytest.approx(constant))


def test_without_answers_nothing_is_judged(setup: Setup) -> None:
    said = answers(*["a"] * 12)
    alone = Alone(said, gap([[0.0, 0.0]] * 12))
    found = summarised(setup, setup.task.training, said, alone, alone)
    assert found.base is found.prompted is found.gain is found.constant is None


def test_a_difference_of_times_is_beyond_what_they_vary_by() -> None:
    assert beyond_spread([3.0, 4.0, 9.0], [1.0, 2.0, 2.9]) == 2.0
    assert beyond_spread([3.0, 4.0, 9.0], [1.0, 2.0, 3.0]) is None
    assert beyond_spread([1.0, 2.0, 3.0], [3.0, 4.0, 9.0]) is None
