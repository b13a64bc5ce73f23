"""Stop strings: a completion ends with the token that completes one, in both engines."""

from collections.abc import Callable, Sequence

import pytest
import torch

from opcd.models.lm import stop_at
from opcd.passes.packed import packed_attention
from opcd.rollouts.capture import Recording
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.protocol import RolloutEngine, SamplingParams
from opcd.rollouts.static import StaticEngine
from opcd.rollouts.stops import StopStrings
from tests.conftest import tiny_llama

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
LIMIT = 24
Engine = Callable[..., RolloutEngine]


def letters(ids: Sequence[int]) -> str:
    """Each token as two letters; the EOS as none."""
    return "".join(chr(97 + i // 26) + chr(97 + i % 26) for i in ids if i != 1)


@pytest.fixture(params=[TransformersEngine, StaticEngine])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


def test_the_token_that_completes_a_stop_string_is_the_last() -> None:
    stops = StopStrings(["bc", "ddd"], "".join)
    assert stops.end(["a", "b", "c", "d"]) == 3
    assert stops.end(["ab", "cd", "d"]) == 2, "a token may hold more than the string"
    assert stops.end(["a", "d", "", "dd", "bc"]) == 4, "the first that is complete"
    assert stops.end(["b", "d", "d"]) is None
    assert stops.end([]) is None
    assert stops.cut("xdddbc") == "x"
    assert stops.cut("xbcddd") == "x"
    assert stops.cut("bd") == "bd"


def test_only_the_last_tokens_are_read_for_a_look() -> None:
    read: list[int] = []

    def decode(ids: Sequence[str]) -> str:
        read.append(len(ids))
        return "".join(ids)

    stops = StopStrings(["éé"], decode)
    assert not stops.reached(["a"] * 500)
    assert read == [4 + 16]
    assert stops.reached([*["a"] * 500, "é", "é"])
    assert stops.end([*["a"] * 500, "é", "é", "a"]) == 502


def test_what_looks_like_a_stop_string_in_a_part_alone_is_none() -> None:
    """Some tokenizers leave out a first space of what they decode."""
    stops = StopStrings(["a" * 17], lambda ids: "".join(ids).replace("_", "", 1).lstrip())
    ids = [*["b"] * 50, "_", *["a"] * 16]
    assert not stops.reached(ids)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_completions_end_where_a_stop_string_first_is(engine: Engine, temperature: float) -> None:
    model = tiny_llama()
    made, numbers = engine(model), [3, 4, 5, 6]
    whole = made.generate(PROMPTS, SamplingParams(LIMIT, temperature), numbers)
    texts = [letters(r.completion_token_ids) for r in whole]
    wanted = [texts[0][9:12], texts[2][4:6]]  # across two tokens; a whole one
    params = SamplingParams(LIMIT, temperature, stop=StopStrings(wanted, letters))
    found = made.generate(PROMPTS, params, numbers)
    shorter = 0
    for before, after, text in zip(whole, found, texts, strict=True):
        places = [text.find(x) + len(x) for x in wanted if x in text]
        count = min((-(-place // 2) for place in places), default=len(before.completion_token_ids))
        assert after.completion_token_ids == before.completion_token_ids[:count]
        assert after.finish_reason == ("stop" if places else before.finish_reason)
        shorter += count < len(before.completion_token_ids)
    assert shorter >= 2


def test_an_end_of_the_models_own_comes_first(engine: Engine) -> None:
    """And one behind a stop string is not there."""
    model = tiny_llama()
    ids = engine(model).generate([[5]], SamplingParams(LIMIT, 0.0))[0].completion_token_ids
    place = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    stop_at(model, ids[place : place + 1])
    made = engine(model)
    behind = SamplingParams(LIMIT, 0.0, stop=StopStrings(["no such text"], letters))
    (rollout,) = made.generate([[5]], behind)
    assert (rollout.completion_token_ids, rollout.finish_reason) == (ids[: place + 1], "stop")
    front = SamplingParams(LIMIT, 0.0, stop=StopStrings([letters(ids[place - 1 : place])], letters))
    (rollout,) = made.generate([[5]], front)
    assert len(rollout.completion_token_ids) <= place
    assert rollout.finish_reason == "stop"


def test_conversations_go_on_behind_a_stop_string(engine: Engine) -> None:
    model = tiny_llama()
    made = engine(model, 2)
    plain = SamplingParams(LIMIT, 0.0)
    texts = [letters(r.completion_token_ids) for r in made.generate(PROMPTS, plain)]
    params = SamplingParams(LIMIT, 0.0, stop=StopStrings([texts[0][6:9], texts[3][10:12]], letters))
    rows = made.open(PROMPTS)
    for new in ([[20, 21], [22], [23] * 5, [24]], [[30], [31], [32], [33]]):
        held = rows.token_ids
        turn = rows.complete(params)
        for ids, rollout in zip(held, turn, strict=True):
            (alone,) = made.generate([ids], params)
            assert rollout.completion_token_ids == alone.completion_token_ids
            assert rollout.finish_reason == alone.finish_reason
        rows.append(new)
    again = rows.complete(plain)
    for ids, rollout in zip(rows.token_ids, again, strict=True):
        own = ids[: len(ids) - len(rollout.completion_token_ids)]
        assert rollout.completion_token_ids == made.generate([own], plain)[0].completion_token_ids


def test_a_graph_that_goes_on_to_the_next_look_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where rows are looked at now and then."""
    monkeypatch.setattr("opcd.rollouts.decode.STEPS_BETWEEN_LOOKS", 8)
    model = tiny_llama()
    made = StaticEngine(model)
    ids = made.generate([[5, 6]], SamplingParams(LIMIT, 0.0))[0].completion_token_ids
    params = SamplingParams(LIMIT, 0.0, stop=StopStrings([letters(ids[2:4])], letters))
    decoder = made._decoder_for(1, 2 + LIMIT, truncates=False)
    decoder.load([[5, 6]], None, params, torch.tensor([0]))
    steps: list[int] = []
    plain = decoder.step

    class Graph:
        def replay(self) -> None:
            steps.append(1)
            plain()

    decoder._recorded = Recording(None, torch.empty(0), Graph())
    with torch.no_grad(), packed_attention(model):
        decoder.run(params)
    end = StopStrings([letters(ids[2:4])], letters).end(ids)
    assert len(steps) == 8, "a look in eight steps"
    (sequence,) = decoder.sequences()
    assert len(sequence) == 2 + 8
    assert params.finished(sequence[2:], [1]) == (ids[:end], "stop")
    decoder.cut({0: 2 + end})
    assert decoder.sequences() == [[5, 6, *ids[:end]]]
