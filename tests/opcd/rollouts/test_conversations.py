"""Conversations: every turn is that of the whole sequence, and no token is computed twice."""

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from opcd.errors import InputError
from opcd.models.lm import eos_token_ids, stop_at
from opcd.passes.plan import find_plan
from opcd.rollouts.decode import Decoder
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.generate_call import generated
from opcd.rollouts.padding import pads_are_neutral
from opcd.rollouts.protocol import Conversations, Rollout, RolloutEngine, SamplingParams
from opcd.rollouts.static import StaticEngine, why_not_static
from tests.conftest import tiny_llama
from tests.opcd.architectures import ARCHITECTURES, build
from tests.opcd.rollouts.played_cuda import PlayedCuda

SHARED = list(range(60, 90))
PROMPTS = [[*SHARED, 5], [*SHARED, 6, 7, 8], [*SHARED, 9, 10], [*SHARED, 11, 12], [*SHARED, 13]]
GREEDY = SamplingParams(6, temperature=0.0)
SAMPLED = SamplingParams(6, temperature=0.8)
Engine = Callable[..., RolloutEngine]


@pytest.fixture(params=[TransformersEngine, StaticEngine])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


def engines(model: torch.nn.Module, batch_size: int) -> Iterator[RolloutEngine]:
    plan = find_plan(model, SHARED)
    yield TransformersEngine(model, batch_size, plan.shares_prefix)
    if plan.packed:
        assert why_not_static(model, plan) is None
        yield StaticEngine(model, batch_size)


def said(turn: Sequence[Rollout | None]) -> list[list[int] | None]:
    return [None if rollout is None else rollout.completion_token_ids for rollout in turn]


def anew(
    engine: RolloutEngine, held: list[list[int]], params: SamplingParams, streams: list[int]
) -> list[list[int] | None]:
    """What the engine says to whole sequences, each alone."""
    return [
        engine.generate([ids], params, [stream])[0].completion_token_ids
        for ids, stream in zip(held, streams, strict=True)
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_turn_is_that_of_the_whole_sequence(name: str) -> None:
    """Rows of several lengths, some of which end a turn early, in batches of 3."""
    model = build(name)
    first = TransformersEngine(model, share_prefix=False).generate([PROMPTS[1]], GREEDY)
    stop_at(model, first[0].completion_token_ids[2:3])  # one row at least ends early
    turns = [[[20], [21, 22, 23], [24], [25] * 9, [26]], [[30] * 4, [31], [32, 33], [34], [35]]]
    for made in engines(model, 3):
        rows, held = made.open(PROMPTS), [list(p) for p in PROMPTS]
        for number, new in enumerate([*turns, None]):
            params = SAMPLED if number == 1 else GREEDY
            streams = [100 * number + i for i in range(len(held))]
            turn = rows.complete(params, streams)
            assert said(turn) == anew(made, held, params, streams), (made.name, number)
            held = [h + (c or []) for h, c in zip(held, said(turn), strict=True)]
            assert rows.token_ids == held
            if new:
                rows.append(new)
                held = [h + n for h, n in zip(held, new, strict=True)]
        rows.close()


def test_a_turn_says_what_it_answered_and_how_it_ended(engine: Engine) -> None:
    model = tiny_llama()
    first = engine(model).generate([[5]], GREEDY)[0].completion_token_ids
    end = next(i for i in range(1, 6) if first[i] not in first[:i])
    stop_at(model, first[end : end + 1])
    made = engine(model)
    made.sync(model, 4)
    rows = made.open([[5], [6, 7]])
    one, other = rows.complete(GREEDY)
    assert one is not None
    assert other is not None
    assert one.prompt_token_ids == [5]
    assert one.finish_reason == "stop"
    assert one.completion_token_ids == first[: end + 1]
    assert one.weights_version == 4
    rows.append([[8], [9]])
    again, _ = rows.complete(GREEDY)
    assert again is not None
    assert again.prompt_token_ids == [5, *first[: end + 1], 8]


def test_rows_end_and_others_go_on(engine: Engine) -> None:
    made = engine(tiny_llama(), 2)
    rows = made.open(PROMPTS)
    rows.complete(GREEDY)
    rows.append([[20], [], [21, 22], [], [23]])
    held = rows.token_ids
    turn = said(rows.complete(GREEDY))
    assert turn[1] is turn[3] is None
    for i in (0, 2, 4):
        assert turn[i] == made.generate([held[i]], GREEDY)[0].completion_token_ids
    with pytest.raises(ValueError, match=r"rows \[1\] have ended"):
        rows.append([[1], [2], [3], [], [4]])
    rows.append([[], [], [], [], [24]])
    held = rows.token_ids
    turn = said(rows.complete(GREEDY))
    assert turn[:4] == [None] * 4
    assert turn[4] == made.generate([held[4]], GREEDY)[0].completion_token_ids
    rows.append([[]] * 5)
    assert rows.complete(GREEDY) == [None] * 5


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Tokens, pads among them, that went into the model's layers."""
    found: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    yield found
    hook.remove()


def talk(rows: Conversations, turns: int) -> None:
    for turn in range(turns):
        rows.complete(GREEDY)
        if turn < turns - 1:
            rows.append([[20 + turn] * 7 for _ in rows.token_ids])


def test_no_token_is_computed_twice(engine: Engine) -> None:
    """16 conversations of 6 turns behind 200 tokens: at most 1.05 of the least possible."""
    model = tiny_llama(eos_token_id=257, max_position_embeddings=1024)
    with torch.no_grad():
        model.lm_head.weight[257] = 0  # no turn ends early: nobody is idle
    model.generation_config.eos_token_id = 257
    shared = [(7 * i) % 200 + 20 for i in range(200)]
    prompts = [[*shared, 30 + i, 31, 32] for i in range(16)]
    assert pads_are_neutral(model)  # which is tried once
    with counted(model) as found:
        rows = engine(model, 16).open(prompts)
        talk(rows, 6)
    whole = rows.token_ids
    # The shared start once; of the rest each token, but the last, which nothing is predicted from.
    least = len(shared) + sum(len(ids) - len(shared) - 1 for ids in whole)
    assert least <= sum(found) <= 1.05 * least
    anew = sum(6 * len(prompt) for prompt in prompts)
    assert sum(found) < 0.2 * anew


def test_equal_beginnings_are_computed_once(engine: Engine) -> None:
    """Four conversations of each of 4 prompts: all that one begins with goes in once."""
    model = tiny_llama(max_position_embeddings=1024)
    shared = [(7 * i) % 200 + 20 for i in range(100)]
    prompts = [[*shared, *(30 + (i * k) % 97 for k in range(60))] for i in range(4) for _ in "1234"]
    made = engine(model, 16)
    assert pads_are_neutral(model)  # which is tried once
    with counted(model) as found:
        rows = made.open(prompts)
        turns = [said(rows.complete(SAMPLED, [*range(16)]))]
    # The start of all, four rests, and of each row its last token and what it says, or waits for.
    assert sum(found) <= 1.05 * (100 + 4 * 59 + 16 * 6)
    rows.append([[20, 21]] * 16)
    held = rows.token_ids
    turns.append(said(rows.complete(GREEDY)))
    assert turns[0] == anew(made, prompts, SAMPLED, [*range(16)])
    assert turns[1] == anew(made, held, GREEDY, [0] * 16)


def test_memory_grows_with_conversations() -> None:
    model = tiny_llama()
    made = StaticEngine(model)
    rows = made.open([[5, 6], [7]])
    for _ in range(12):
        rows.complete(GREEDY)
        rows.append([[8] * 10, [9] * 3])
    held = rows.token_ids
    assert max(map(len, held)) > 128
    assert said(rows.complete(GREEDY)) == anew(made, held, GREEDY, [0, 0])


def test_a_conversation_ends_with_the_models_positions(engine: Engine) -> None:
    model = tiny_llama(max_position_embeddings=20)
    rows = engine(model).open([[5, 6, 7], [8]])
    rows.complete(GREEDY)
    with pytest.raises(InputError, match="must fit the model's 20 positions, got row 0 with 9"):
        rows.append([[9] * 12, [9]])
    rows.append([[9] * 6, [9]])
    with pytest.raises(InputError, match="row 0 with 15 tokens and 6 more"):
        rows.complete(GREEDY)
    rows.append([[], [9]])
    assert rows.complete(GREEDY)[0] is None


def test_what_a_conversation_must_not_be_given(engine: Engine) -> None:
    made = engine(tiny_llama())
    with pytest.raises(ValueError, match="begin with at least one token"):
        made.open([[5], []])
    rows = made.open([[5], [6]])
    with pytest.raises(ValueError, match="a stream each"):
        rows.complete(SAMPLED)
    with pytest.raises(ValueError, match="got 1 for 2"):
        rows.append([[5]])
    assert eos_token_ids(made._model) == [1]


class Memory:
    """A GPU that holds decoders of so many slots together, whoever holds them."""

    def __init__(self, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slots, self.most = slots, 0
        self.living: weakref.WeakSet[Decoder] = weakref.WeakSet()
        make = Decoder.__init__

        def made(decoder: Decoder, model: object, rows: int, length: int, *more: object) -> None:
            gc.collect()
            held = sum(d.rows * d.length for d in self.living) + rows * length
            if held > self.slots:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
            self.most = max(self.most, held)
            make(decoder, model, rows, length, *more)
            self.living.add(decoder)

        monkeypatch.setattr(Decoder, "__init__", made)


def conversation(made: RolloutEngine, turns: int = 4) -> list[list[int]]:
    """Rows of which one ends early, sampled; their tokens grow from 33 to some 120."""
    rows = made.open(PROMPTS)
    for turn in range(turns):
        rows.complete(SAMPLED, [100 * turn + i for i in range(len(PROMPTS))])
        new = [[20 + turn] * (15 + i) for i in range(len(PROMPTS))]
        if turn > 0:
            new[1] = []
        rows.append(new)
    rows.complete(GREEDY)
    found = rows.token_ids
    rows.close()
    return found


AGAIN = "conversations are computed again in every turn from now on"
FEWER = "rollouts sample {} sequences at once from now on"
GENERATE = "rollouts use transformers.generate from now on"


@pytest.mark.parametrize(
    ("slots", "said_of_it"),
    [
        (2000, []),
        (400, [AGAIN]),  # batches of two at 128 and 64 slots each, one after the other
        (200, [AGAIN, FEWER.format(1)]),
        (100, [AGAIN, FEWER.format(1), GENERATE]),
    ],
)
def test_conversations_that_outgrow_the_memory_go_on(
    slots: int, said_of_it: list[str], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model = tiny_llama()
    expected = conversation(StaticEngine(model, 2))
    assert max(map(len, expected)) > 64 + 20
    memory = Memory(slots, monkeypatch)
    engine = StaticEngine(model, 2)
    assert conversation(engine) == expected
    assert memory.most <= slots
    assert engine.name == ("generate" if GENERATE in said_of_it else "static")
    assert conversation(engine) == expected, "and again, with nothing more to say"
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(said_of_it), messages
    for message, part in zip(messages, said_of_it, strict=True):
        assert part in message
    gc.collect()
    assert not memory.living, "closed"


def test_a_larger_graph_that_cuda_refuses_leaves_generate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of a conversation; another that is open goes on too, with nothing to say."""
    model = tiny_llama()
    expected = conversation(TransformersEngine(model, 2))
    cuda = PlayedCuda(monkeypatch)
    capture = Decoder.capture

    def captured(decoder: Decoder) -> None:
        cuda.fails = (lambda: None) if decoder.length > 64 else None
        capture(decoder)
        decoder._recorded.graph.decoder = decoder

    monkeypatch.setattr(Decoder, "capture", captured)
    engine = StaticEngine(model, 2)
    engine._graphed = True
    other = engine.open([[5, 6], [7]])
    first = said(other.complete(GREEDY))
    assert conversation(engine) == expected
    assert engine.name == "generate"
    other.append([[9] * 60, [8]])
    second = said(other.complete(GREEDY))
    held = [[5, 6, *first[0], *[9] * 60], [7, *first[1], 8]]
    assert second == anew(TransformersEngine(model), held, GREEDY, [0, 0])
    (record,) = caplog.records
    assert GENERATE in record.getMessage()
    assert "does not fit into a CUDA graph" in record.getMessage()


def test_conversations_by_generate_that_outgrow_the_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    expected = conversation(TransformersEngine(model, 4))
    limit = [180]  # columns of all rows of a call

    def bounded(model: torch.nn.Module, ids: torch.Tensor, *more: object) -> object:
        if ids.numel() > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generated(model, ids, *more)

    monkeypatch.setattr("opcd.rollouts.generate_conversations.generated", bounded)
    engine = TransformersEngine(model, 4)
    assert conversation(engine) == expected
    messages = [record.getMessage() for record in caplog.records]
    assert AGAIN in messages[0]
    assert FEWER.format(1) in messages[-1]
    limit[0] = 50
    with pytest.raises(InputError, match=r"must fit the GPU's memory.*alone does not"):
        conversation(engine)
