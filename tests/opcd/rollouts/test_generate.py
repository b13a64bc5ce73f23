"""Sampling by either engine: the right distribution, EOS kept, pads and prefix without effect."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from transformers import GenerationConfig

from opcd.models.lm import eos_token_ids, stop_at
from opcd.passes.plan import find_plan
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.protocol import RolloutEngine, SamplingParams
from opcd.rollouts.static import StaticEngine, why_not_static
from tests.conftest import tiny_llama
from tests.opcd.architectures import ARCHITECTURES, build

GREEDY = SamplingParams(max_completion_tokens=6, temperature=0.0)
Engine = Callable[..., RolloutEngine]


@torch.no_grad()
def greedy_alone(model: torch.nn.Module, prompt: list[int], limit: int) -> list[int]:
    ids = list(prompt)
    for _ in range(limit):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(logits[0, -1].argmax().item())
        if ids[-1] == 1:
            break
    return ids[len(prompt) :]


@pytest.fixture(params=[1, 10**9], ids=["shared-start", "whole-prompts"], autouse=True)
def min_tokens_saved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds whether or not the prompts' common start is computed once."""
    monkeypatch.setattr("opcd.passes.prefix.MIN_TOKENS_SAVED", request.param)


@pytest.fixture(params=[TransformersEngine, StaticEngine])
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batched_behind_a_shared_prefix_equals_each_prompt_alone(name: str) -> None:
    model = build(name)
    shared = list(range(60, 90))
    prompts = [[*shared, 5], [*shared, 6, 7, 8], [*shared, 9, 10], [*shared, 11, 12]]
    share = find_plan(model, shared).shares_prefix
    assert share == (name != "mamba")
    expected = [greedy_alone(model, p, 20) for p in prompts]
    params = SamplingParams(20, temperature=0.0)
    engines: list[RolloutEngine] = [TransformersEngine(model, 3, share)]
    plan = find_plan(model, shared)
    assert (why_not_static(model, plan) is None) == plan.packed
    if plan.packed:
        engines.append(StaticEngine(model, 3))
    for engine in engines:
        rollouts = engine.generate(prompts, params)
        assert [r.prompt_token_ids for r in rollouts] == prompts
        assert [r.completion_token_ids for r in rollouts] == expected, engine.name


def test_without_a_shared_prefix_only_equal_lengths_are_batched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama()
    shapes = []
    generate = model.generate

    def record(**options: object) -> object:
        assert options["attention_mask"].all(), "a pad among prompts of one length"
        shapes.append(tuple(options["input_ids"].shape))
        return generate(**options)

    monkeypatch.setattr(model, "generate", record)
    prompts = [[5, 6, 7], [5], [5, 10, 11], [5, 13]]
    rollouts = TransformersEngine(model, share_prefix=False).generate(prompts, GREEDY)
    assert sorted(shapes) == [(1, 1), (1, 2), (2, 3)]
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        assert rollout.completion_token_ids == greedy_alone(model, prompt, 6)


def test_short_rows_may_be_more_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    shapes = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **o: shapes.append(o["input_ids"].shape) or generate(**o)
    )
    monkeypatch.setattr("opcd.rollouts.generate.TOKENS_A_ROW", 40)
    prompts = [[5 + i] for i in range(12)]  # 1 + 6 tokens each
    TransformersEngine(model, batch_size=2).generate(prompts, GREEDY)
    long = [[5] * 30 + [i] for i in range(5)]
    TransformersEngine(model, batch_size=2).generate(long, GREEDY)
    assert [rows for rows, _ in shapes] == [11, 1, 2, 2, 1]


def test_prompts_without_a_common_start(engine: Engine) -> None:
    model = tiny_llama()
    prompts = [[5], [6, 7, 8], [9]]
    rollouts = engine(model).generate(prompts, GREEDY)
    expected = [greedy_alone(model, p, 6) for p in prompts]
    assert [r.completion_token_ids for r in rollouts] == expected


def quantile_999(freedom: int) -> float:
    """Of chi-square (Wilson and Hilferty, 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.0902 * sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_samples_follow_the_models_own_distribution(engine: Engine, temperature: float) -> None:
    """Chi-square over pairs of tokens, with generation defaults that would bend the distribution.

    The second token's distribution depends on the first: what a wrong cache would get wrong.
    """
    model = tiny_llama(vocab_size=12, initializer_range=0.5)
    model.generation_config = GenerationConfig(
        top_k=2, top_p=0.5, repetition_penalty=3.0, eos_token_id=1, pad_token_id=1
    )
    n, prompt = 6000, [3, 4, 5]
    params = SamplingParams(max_completion_tokens=2, temperature=temperature)
    drawn = engine(model, n).generate([prompt] * n, params, range(n))
    with torch.no_grad():
        ids = torch.tensor([[*prompt, token] for token in range(12)])
        first, second = (model(ids).logits[:, -2:] / temperature).softmax(-1).unbind(1)
    pairs = first[0][:, None] * second  # (12, 12)
    pairs[1] = torch.eye(12)[1] * first[0, 1]  # nothing follows the EOS
    counts = torch.zeros(12, 12)
    for rollout in drawn:
        a, *rest = rollout.completion_token_ids
        counts[a, rest[0] if rest else 1] += 1
    often = n * pairs >= 5
    expected = torch.cat([n * pairs[often], n * pairs[~often].sum()[None]])
    found = torch.cat([counts[often], counts[~often].sum()[None]])
    statistic = ((found - expected) ** 2 / expected).sum().item()
    assert len(expected) > 30
    assert statistic < quantile_999(len(expected) - 1)
    assert model.generation_config.top_k == 2, "the model's own defaults must survive"


def test_eos_is_kept_and_what_follows_is_not(engine: Engine) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    prompts = [[5]] * 20 + [[6, 7]] * 20
    rollouts = engine(model).generate(prompts, SamplingParams(200, 1.0), range(40))
    assert len(rollouts) == 40
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    cut = [r for r in rollouts if r.finish_reason == "length"]
    assert stopped
    assert cut
    for r in stopped:
        assert r.completion_token_ids.index(1) == len(r.completion_token_ids) - 1
    for r in cut:
        assert 1 not in r.completion_token_ids
        assert len(r.completion_token_ids) == 200
    assert [r.prompt_token_ids for r in rollouts] == prompts


def test_the_version_of_the_weights_is_recorded(engine: Engine) -> None:
    model = tiny_llama()
    made = engine(model)
    made.sync(model, 7)
    assert made.generate([[5]], GREEDY)[0].weights_version == 7
    with pytest.raises(AssertionError, match="samples from the module"):
        made.sync(tiny_llama(), 8)


def test_the_tokenizers_eos_ends_a_completion_too(engine: Engine) -> None:
    model = tiny_llama()
    first = engine(model).generate([[5]], GREEDY)[0].completion_token_ids
    stop_at(model, first[:1])
    stop_at(model, [])
    rollout = engine(model).generate([[5]], GREEDY)[0]
    assert rollout.completion_token_ids == first[:1]
    assert len(first) > 1
    assert rollout.finish_reason == "stop"
    assert eos_token_ids(model) == [1, first[0]]


def test_an_eos_that_is_the_last_allowed_token_is_a_stop(engine: Engine) -> None:
    model = tiny_llama()
    tokens = engine(model).generate([[5]], GREEDY)[0].completion_token_ids
    last = next(i for i in range(len(tokens) - 1, 0, -1) if tokens[i] not in tokens[:i])
    stop_at(model, [tokens[last]])
    rollout = engine(model).generate([[5]], SamplingParams(last + 1, 0.0))[0]
    assert rollout.completion_token_ids == tokens[: last + 1]
    assert rollout.finish_reason == "stop"
