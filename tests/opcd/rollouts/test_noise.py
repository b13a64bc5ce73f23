"""What a completion draws: the right distribution, and the same whatever is drawn beside it."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch

from opcd.episodes import Prompt
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.noise import BLOCK, drawn, shifted_sums, streams, truncated, uniforms
from opcd.rollouts.protocol import RolloutEngine, SamplingParams, complete
from opcd.rollouts.static import StaticEngine
from tests.conftest import tiny_llama

# The start that all share is long enough to be computed once.
PROMPTS = [Prompt([*range(40, 80), 5 + i, *range(100, 100 + i % 5)], [7]) for i in range(16)]
PARAMS = SamplingParams(max_completion_tokens=12, temperature=1.0)


@pytest.fixture(params=[TransformersEngine, StaticEngine])
def engine(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RolloutEngine]:
    monkeypatch.setattr("opcd.rollouts.generate.TOKENS_A_ROW", 1)  # batches of the size asked for
    return request.param


def test_a_completion_is_the_same_at_every_batch_and_in_every_order(
    engine: Callable[..., RolloutEngine],
) -> None:
    model = tiny_llama(initializer_range=0.1)
    found = [
        complete(engine(model, batch), PROMPTS, PARAMS, seed=1, step=2) for batch in (1, 4, 16)
    ]
    assert found[0] == found[1] == found[2]
    assert len({tuple(e.student_ids[-12:]) for e in found[0]}) == 16
    backwards = complete(engine(model, 5), PROMPTS[::-1], PARAMS, seed=1, step=2)
    assert backwards[::-1] == found[0]
    some = complete(engine(model, 5), PROMPTS[3:6], PARAMS, seed=1, step=2)
    assert some == found[0][3:6]


def test_both_engines_draw_the_same() -> None:
    model = tiny_llama(initializer_range=0.1)
    first, second = (
        complete(make(model, 16), PROMPTS, PARAMS, seed=1, step=2, n=2)
        for make in (TransformersEngine, StaticEngine)
    )
    assert first == second


def test_draws_leave_the_global_generator_alone(engine: Callable[..., RolloutEngine]) -> None:
    before = torch.get_rng_state()
    complete(engine(tiny_llama(), 4), PROMPTS, PARAMS, seed=1, step=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_differ_in_everything_that_they_depend_on() -> None:
    a, b = PROMPTS[:2]
    found = streams(0, 0, [a, b, a], n=2)
    assert len(set(found)) == 6, "a prompt that comes again goes on counting"
    assert streams(0, 0, [b, a, a], n=2)[2:] == [found[0], found[1], found[4], found[5]]
    others = [
        streams(1, 0, [a])[0],
        streams(0, 1, [a])[0],
        streams(0, 0, [Prompt(a.student_ids, a.teacher_ids, "bank")])[0],
    ]
    assert len({*found, *others}) == 9


def test_a_sampled_call_needs_streams() -> None:
    engine = TransformersEngine(tiny_llama(), 4)
    with pytest.raises(ValueError, match="must have a stream each"):
        engine.generate([[5]], PARAMS)
    with pytest.raises(ValueError, match="one stream a completion, got 2 for 1"):
        engine.generate([[5]], PARAMS, [1, 2])


def test_uniform_numbers_are_uniform_and_independent() -> None:
    """Chi-square over a grid of neighbours in position, and of neighbours in stream."""
    stream = torch.arange(2000)[:, None].expand(-1, 50)
    x = uniforms(stream.reshape(-1), torch.arange(50).repeat(2000)).view(2000, 50)
    assert 0 <= x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1
    for a, b in ((x[:, ::2], x[:, 1::2]), (x[::2], x[1::2])):
        cells = (a * 16).long() * 16 + (b * 16).long()
        counts = torch.bincount(cells.flatten(), minlength=256).double()
        expected = a.numel() / 256
        statistic = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(statistic - 255) < 4 * sqrt(2 * 255)


def draw(logits: torch.Tensor, u: float) -> int:
    return drawn(logits[None], torch.tensor([u], dtype=torch.float64), 1.0).item()


def first_uniform(logits: torch.Tensor, token: int) -> float:
    """Where the tokens from `token` on begin, found by halving."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if draw(logits, middle) >= token else (middle, high)
    return high


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 700, 999])
@pytest.mark.parametrize("probability", [1e-7, 1e-11])
def test_a_rare_token_is_drawn_as_often_as_it_should(place: int, probability: float) -> None:
    """Beside tokens that hold nearly everything, also as the last of their block and of all."""
    logits = torch.full((1000,), -torch.inf)
    logits[[3, max(place - 1, 4), 500]] = 0.0
    logits[place] = torch.tensor(3 * probability).log()
    width = first_uniform(logits, place + 1) - first_uniform(logits, place)
    assert width == pytest.approx(probability, rel=1e-4)


def test_running_sums_of_a_gpu_are_those_of_a_cpu() -> None:
    x = torch.rand(3, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(shifted_sums(x), x.cumsum(-1), rtol=1e-15)


def test_every_number_draws_a_token_that_is_possible() -> None:
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    for v in (3, BLOCK, BLOCK + 1, 5 * BLOCK - 1):
        logits = 20 * torch.randn(len(edges), v, generator=generator)
        impossible = torch.rand(len(edges), v, generator=generator) < 0.7
        impossible[:, v // 2] = False
        token = drawn(logits.masked_fill(impossible, -torch.inf), edges, 1.0)
        assert not impossible.gather(1, token[:, None]).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_follow_their_probabilities(temperature: float) -> None:
    logits = 2 * torch.randn(3 * BLOCK + 5, generator=torch.Generator().manual_seed(0))
    n = 200_000
    numbers = uniforms(torch.arange(n), 0)
    tokens = torch.cat(
        [drawn(logits.expand(len(u), -1), u, temperature) for u in numbers.split(500)]
    )
    expected = n * (logits / temperature).double().softmax(-1)
    counts = torch.bincount(tokens, minlength=len(logits)).double()
    often = expected > 10
    statistic = ((counts - expected) ** 2 / expected)[often].sum().item()
    freedom = int(often.sum()) - 1
    assert freedom > 30
    assert abs(statistic - freedom) < 4 * sqrt(2 * freedom)


def plain_head(logits: torch.Tensor, temperature: float, k: int, p: float) -> torch.Tensor:
    """The distribution of the likeliest tokens, in fp64, one token after the other."""
    shares = torch.softmax(logits.double() / temperature, -1)
    order = sorted(range(len(shares)), key=lambda i: (-logits[i].item(), i))
    if k:
        order = order[:k]
    whole = sum(shares[i].item() for i in order)
    kept, held = [], 0.0
    for i in order:
        if p == 1 or held / whole < p:
            kept.append(i)
            held += shares[i].item()
    head = torch.zeros_like(shares)
    head[kept] = shares[kept] / held
    return head


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("k", "p"), [(20, 0.95), (0, 0.9), (3, 1.0), (0, 1.0), (1, 0.5), (999, 1)])
def test_the_head_of_a_distribution_is_renormalised(temperature: float, k: int, p: float) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = 3 * torch.randn(4, 300, generator=generator)
    logits[1, 5:50] = logits[1].max() + 1  # equal ones
    logits[2] = -torch.inf
    logits[2, 17] = 0.0
    for top_k, top_p in ((k, p), (torch.tensor(k), torch.tensor(p, dtype=torch.float64))):
        found = truncated(logits, temperature, top_k, top_p)
        for row, scores in zip(found, logits, strict=True):
            expected = plain_head(scores, temperature, k, p)
            assert torch.equal(torch.isfinite(row), expected > 0)
            share = torch.softmax(row.double() / temperature, -1)
            assert torch.allclose(share, expected, atol=1e-12)


def test_of_the_whole_distribution_nothing_is_left_out() -> None:
    logits = torch.zeros(1, 50_000)
    logits[0, 7] = 40.0
    assert torch.equal(truncated(logits, 1.0, 0, 1.0), logits)


def test_what_is_drawn_of_the_head_comes_as_often_as_it_should() -> None:
    logits = torch.log(torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1]))
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    head = truncated(logits[None], 1.0, 4, 0.8).expand(10_000, -1)
    counts = torch.bincount(drawn(head, uniform, 1.0), minlength=5) / 10_000
    # Of 0.4, 0.3, 0.15, 0.1 the first three are the fewest that hold 0.8 of 0.95.
    assert torch.allclose(counts, torch.tensor([0.4, 0, 0.3, 0.15, 0]) / 0.85, atol=2e-4)


@pytest.mark.parametrize("engine", [TransformersEngine, StaticEngine])
def test_engines_draw_from_the_head(engine: type) -> None:
    """Each token as the head of its own distribution says, by the completion's number."""
    model = tiny_llama()
    params = SamplingParams(12, 1.3, top_k=5, top_p=0.8)
    made, numbers = engine(model), [3, 4, 5]
    prompts = [[5, 6, 7], [8], [9, 10]]
    rollouts = made.generate(prompts, params, numbers)
    for prompt, stream, rollout in zip(prompts, numbers, rollouts, strict=True):
        ids = [*prompt, *rollout.completion_token_ids]
        logits = model(input_ids=torch.tensor([ids])).logits[0].detach()
        for place, token in enumerate(rollout.completion_token_ids):
            head = plain_head(logits[len(prompt) - 1 + place], 1.3, 5, 0.8)
            at = head.cumsum(0)
            u = uniforms(torch.tensor([stream]), place).item()
            assert head[token] > 0
            assert at[token] - head[token] - 1e-4 <= u <= at[token] + 1e-4
    whole = made.generate(prompts, SamplingParams(12, 1.3), numbers)
    assert [r.completion_token_ids for r in whole] != [r.completion_token_ids for r in rollouts]
