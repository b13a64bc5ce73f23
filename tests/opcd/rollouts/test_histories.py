"""Histories that prompts share: found, computed once, and exact."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from opcd.models.lm import stop_at
from opcd.passes.plan import find_plan
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.histories import Branch, batches_by_history, branches
from opcd.rollouts.protocol import RolloutEngine, SamplingParams
from opcd.rollouts.static import StaticEngine
from opcd.runtime.batches import pieces_by_tokens
from tests.conftest import tiny_llama
from tests.opcd.architectures import ARCHITECTURES, build

OPENING = [250, 251, 252]  # what opens an answer, and stands in no history
SAMPLED = SamplingParams(6, temperature=0.9)


def conversation(number: int, turns: int, length: int = 40, opening: Sequence[int] = ()) -> list:
    """The prompts of a recording: each is the next one's beginning, but for what opens answers."""
    said = [(17 * number + 7 * i) % 180 + 30 for i in range(turns * length)]
    return [[9, 8, 7, *said[: (turn + 1) * length], *opening] for turn in range(turns)]


def test_a_prompt_is_the_beginning_of_the_next_one() -> None:
    one, two, three = conversation(1, 3)
    other = conversation(2, 1)[0]
    found = branches([one, three, other, two, one], 3)
    assert found == [Branch(1, 43), Branch(1, 123), Branch(2, 43), Branch(1, 83), Branch(1, 43)]


def test_what_opens_an_answer_is_a_rest_of_its_own() -> None:
    prompts = conversation(1, 4, opening=OPENING)
    assert [b.length for b in branches(prompts, 3)] == [43, 83, 123, 166]
    assert {b.trunk for b in branches(prompts, 3)} == {3}


def test_rests_that_save_too_little_are_whole() -> None:
    """A second pass reads every weight; what needs none is shared all the same."""
    prompts = conversation(1, 3, length=20, opening=OPENING)
    assert [b.trunk for b in branches(prompts, 3)] == [0, 1, 2]
    assert [b.trunk for b in branches([*prompts, prompts[0]], 3)] == [0, 1, 2, 0]


def test_what_has_little_in_common_is_apart() -> None:
    long = [[9, 8, 7, *range(30, 60), *[first] * 100] for first in (100, 101)]
    assert [b.trunk for b in branches(long, 3)] == [0, 1], "30 of 130 tokens"


def test_batches_keep_a_history_together() -> None:
    prompts = [*conversation(1, 3), *conversation(2, 3), [9, 8, 7, 5], *conversation(3, 2)]
    order = [0, 3, 6, 7, 1, 4, 8, 2, 5]
    shuffled = [prompts[i] for i in order]
    found = [sorted(order[i] for i in batch) for batch in batches_by_history(shuffled, 3, 4)]
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    halves = list(batches_by_history(conversation(1, 5), 3, 2))
    assert sorted(map(len, halves)) == [1, 2, 2]
    assert sorted(i for batch in halves for i in batch) == [0, 1, 2, 3, 4]


def test_batches_of_what_shares_nothing_are_those_by_length() -> None:
    prompts = [[9, first, *[first] * (first % 5)] for first in range(20, 40)]
    lengths = [*map(len, prompts)]
    order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
    assert list(batches_by_history(prompts, 1, 6)) == [order[i : i + 6] for i in range(0, 20, 6)]
    assert list(batches_by_history([], 0, 6)) == []


@pytest.mark.parametrize("whole", [False, True])
def test_passes_hold_no_more_than_they_may_and_whole_sequences_where_those_are_asked_for(
    whole: bool,
) -> None:
    lengths = [7, 4, 9, 1, 0, 10]
    passes = [[tuple(piece) for piece in some] for some in pieces_by_tokens(lengths, 10, whole)]
    assert all(sum(end - begin for _, begin, end in some) <= 10 for some in passes)
    tokens = [(i, t) for some in passes for i, begin, end in some for t in range(begin, end)]
    assert tokens == [(i, t) for i, length in enumerate(lengths) for t in range(length)]
    assert len(passes) == 4
    if whole:
        assert all(end - begin == lengths[i] for some in passes for i, begin, end in some)


def engines(model: torch.nn.Module) -> Iterator[RolloutEngine]:
    plan = find_plan(model, [9, 8, 7, *range(30, 60)])
    yield TransformersEngine(model, 8, plan.shares_prefix)
    if plan.packed:
        yield StaticEngine(model, 8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completions_are_those_of_each_prompt_alone(name: str) -> None:
    """Two samples of each, in batches that part conversations, with and without an opening."""
    model = build(name)
    prompts = [
        *conversation(1, 4, 60, OPENING),
        *conversation(2, 3, 50),
        *conversation(3, 1, 70, OPENING),
    ]
    twice = [p for p in prompts for _ in range(2)]
    numbers = [*range(1, len(twice) + 1)]
    for made in engines(model):
        together = made.generate(twice, SAMPLED, numbers)
        for prompt, stream, rollout in zip(twice, numbers, together, strict=True):
            (alone,) = made.generate([prompt], SAMPLED, [stream])
            assert rollout.completion_token_ids == alone.completion_token_ids, made.name
            assert rollout.prompt_token_ids == prompt


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Tokens, pads among them, that went into the model's layers."""
    found: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    yield found
    hook.remove()


@pytest.mark.parametrize("opening", [(), OPENING])
@pytest.mark.parametrize("engine", [TransformersEngine, StaticEngine])
def test_a_history_is_computed_once(engine: Callable[..., RolloutEngine], opening: list) -> None:
    """16 conversations of 6 turns: at most 1.05 of the least possible."""
    model = tiny_llama(max_position_embeddings=1024)
    with torch.no_grad():
        model.lm_head.weight[1] = 0  # no completion ends early: nobody is idle
    stop_at(model, [1])
    prompts = [p for i in range(16) for p in conversation(i, 6, 50, opening)]
    params = SamplingParams(8, temperature=0.0)
    with counted(model) as found:
        rollouts = engine(model, 32).generate(prompts, params)
    assert all(len(r.completion_token_ids) == 8 for r in rollouts)
    # What all begin with, each history, and of each turn what opens its answer and all that it
    # says but the last token, which nothing is predicted from.
    least = 3 + 16 * (6 * 50 + 6 * (len(opening) + 8 - 1))
    assert least <= sum(found) <= 1.05 * least
    assert sum(found) < 0.45 * (sum(map(len, prompts)) + 96 * 7)
