"""The loss against the definition in fp64 and against plain PyTorch in the same dtype."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opcd_kernels import linear_divergence, reference
from tests.opcd_kernels.problems import (
    DIVERGENCES,
    WHERE,
    Tensors,
    Where,
    assert_as_exact_as_plain,
    error,
    oracle,
    ours,
    problem,
    rounded,
)

everywhere = pytest.mark.parametrize("where", WHERE)
# −inf − −inf is computed, and then not selected.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN on the CPU, so that an output nobody wrote is noticed."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def every_option(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """The problem with biases, token weights and a larger teacher head, and all other options."""
    v, n = len(tensors["student_weight"]), len(tensors["student_hidden"])
    generator = torch.Generator().manual_seed(1)
    more = torch.ones(5, tensors["teacher_weight"].shape[1], dtype=torch.float64)
    bias = torch.randn(v, generator=generator, dtype=torch.float64)
    tensors = tensors | {
        "teacher_weight": torch.cat([tensors["teacher_weight"], more]),
        "student_bias": bias,
        "teacher_bias": torch.cat([bias.flip(0), torch.ones(5, dtype=torch.float64)]),
        "token_weights": torch.rand(n, generator=generator, dtype=torch.float64),
    }
    options = {
        "beta": 0.8,
        "temperature": 0.6,
        "student_softcap": 3.0,
        "teacher_softcap": 4.0,
        "vocab_size": v - 11,
        "chunk_tokens": 2,
    }
    return tensors, options


@pytest.mark.parametrize(
    ("divergence", "chunk_tokens"), itertools.product(DIVERGENCES, [None, 1, 3, 100])
)
def test_equals_the_definition_in_fp64(divergence: str, chunk_tokens: int | None) -> None:
    t, options = problem(), {"divergence": divergence, "beta": 0.3}
    actual = ours(t, chunk_tokens=chunk_tokens, **options)
    for a, e in zip(actual, oracle(t, **options), strict=True):
        assert error(a, e) < 1e-11


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option_together_in_fp64(divergence: str) -> None:
    t, options = every_option(problem())
    expected = oracle(t, divergence=divergence, **options)
    for a, e in zip(ours(t, divergence=divergence, **options), expected, strict=True):
        assert error(a, e) < 1e-11


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_option_together(divergence: str, dtype: torch.dtype, where: Where) -> None:
    t, options = every_option(problem(n=5, v=2500))  # more than one block of the kernel
    assert_as_exact_as_plain(t, dtype, where, divergence=divergence, **options)


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_bf16_keeps_its_digits(divergence: str, noise: float, where: Where) -> None:
    t = rounded(problem(n=64, v=500, d_s=64, d_t=64, noise=noise), torch.bfloat16)
    actual = assert_as_exact_as_plain(t, torch.bfloat16, where, divergence=divergence)
    expected = oracle(t, divergence=divergence)
    assert error(actual.grad_hidden, expected.grad_hidden) < 0.005
    assert error(actual.grad_weight, expected.grad_weight) < 0.005
    assert (actual.per_token - expected.per_token).abs().le(0.01 * expected.per_token).all()
    assert (actual.per_token >= 0).all()


@everywhere
def test_fp32_keeps_its_digits_where_the_models_are_nearly_equal(where: Where) -> None:
    t = rounded(problem(n=16, v=2000, d_s=32, d_t=32, noise=3e-4), torch.float32)
    expected, actual = oracle(t), ours(t, torch.float32, where)
    assert expected.per_token.mean() < 1e-5
    assert error(actual.per_token, expected.per_token) < 0.01
    assert (actual.per_token >= 0).all()


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_models_have_neither_divergence_nor_gradient(
    divergence: str, where: Where
) -> None:
    t = problem(v=2500)
    t |= {k.replace("student", "teacher"): v for k, v in t.items() if k.startswith("student")}
    actual = ours(t, torch.float32, where, divergence=divergence)
    assert actual.per_token.abs().max() < 1e-12
    assert actual.grad_weight.abs().max() < 1e-6
    assert actual.entropy.min() > 1


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_models_far_apart(divergence: str, where: Where) -> None:
    t = problem(d_t=8, v=200)
    t["teacher_weight"] = -3 * t["student_weight"]
    t["teacher_hidden"] = 2 * t["student_hidden"]
    actual = assert_as_exact_as_plain(t, torch.float32, where, divergence=divergence)
    expected = oracle(rounded(t, torch.float32), divergence=divergence)
    assert error(actual.per_token, expected.per_token) < 1e-5


@everywhere
def test_a_shift_of_all_logits_changes_nothing(where: Where) -> None:
    t = problem()
    shift = torch.full((51,), 300.0, dtype=torch.float64)
    plain = ours(t, torch.float32, where)
    moved = ours(t | {"student_bias": shift, "teacher_bias": shift}, torch.float32, where)
    assert error(moved.grad_hidden, plain.grad_hidden) < 1e-3
    assert error(moved.per_token, plain.per_token) < 1e-3


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_entries_that_are_impossible_under_both_models(divergence: str, where: Where) -> None:
    t = problem(n=3, v=2100)
    both = torch.zeros(2100, dtype=torch.float64)
    both[::2] = -torch.inf
    actual = ours(
        t | {"student_bias": both, "teacher_bias": both},
        torch.float32,
        where,
        divergence=divergence,
    )
    odd = t | {k: t[k][1::2] for k in ("student_weight", "teacher_weight")}
    expected = oracle(odd, divergence=divergence)
    assert error(actual.per_token, expected.per_token) < 1e-5
    assert error(actual.entropy, expected.entropy) < 1e-5
    assert error(actual.grad_hidden, expected.grad_hidden) < 1e-5
    assert error(actual.grad_weight[1::2], expected.grad_weight) < 1e-5
    assert (actual.grad_weight[::2] == 0).all()


@everywhere
def test_an_entry_that_one_model_alone_holds_impossible(where: Where) -> None:
    t = {k: v.to(where.device, torch.float32) for k, v in problem(v=2100).items()}
    impossible = torch.zeros(2100, device=where.device)
    impossible[2000] = -torch.inf

    def per_token(**options: Any) -> Tensor:
        return linear_divergence(**t, **options, backend=where.backend).per_token

    assert (per_token(teacher_bias=impossible) == torch.inf).all()
    assert (per_token(student_bias=impossible, divergence="forward_kl") == torch.inf).all()
    # What the student never says costs it nothing; a JSD is at most log 2.
    cut = oracle(
        {
            k: torch.cat([v[:2000], v[2001:]]) if k == "student_weight" else v
            for k, v in t.items()
            if k != "teacher_weight"
        }
        | {"teacher_weight": torch.cat([t["teacher_weight"][:2000], t["teacher_weight"][2001:]])}
    )
    z_t = reference.logits(t["teacher_hidden"].double(), t["teacher_weight"].double()).cpu()
    lost = -torch.log1p(-z_t.softmax(-1)[:, 2000])
    assert error(per_token(student_bias=impossible), cut.per_token + lost) < 1e-5
    jsd = per_token(teacher_bias=impossible, divergence="jsd")
    assert ((jsd > 0) & (jsd < 0.7)).all()


@everywhere
def test_a_token_of_weight_zero_counts_for_nothing_even_if_infinite(where: Where) -> None:
    t = problem(n=3)
    t["teacher_hidden"][1] = torch.nan
    t["student_hidden"][1] = torch.inf
    kept = {k: v[[0, 2]] if k.endswith("hidden") else v for k, v in t.items()}
    expected = oracle(kept)
    for device in {"cpu", where.device}:
        t["token_weights"] = torch.tensor([0.5, 0.0, 0.5], device=device)
        actual = ours(t, torch.float32, where)
        assert error(actual.loss, expected.loss) < 1e-6
        assert error(actual.per_token[[0, 2]], expected.per_token) < 1e-6
        assert actual.per_token[1] == actual.entropy[1] == 0
        assert error(actual.grad_hidden[[0, 2]], expected.grad_hidden) < 1e-5
        assert (actual.grad_hidden[1] == 0).all()
        assert error(actual.grad_weight, expected.grad_weight) < 1e-5


@everywhere
def test_all_weights_zero(where: Where) -> None:
    actual = ours(problem() | {"token_weights": torch.zeros(7)}, torch.float32, where)
    for x in actual:
        assert (x == 0).all()


@everywhere
@pytest.mark.parametrize(("n", "v"), [(0, 5), (1, 1), (1, 7), (2, 2048), (2, 2049)])
def test_small_and_aligned_shapes(n: int, v: int, where: Where) -> None:
    t = problem(n=n, v=v)
    actual = assert_as_exact_as_plain(t, torch.float32, where)
    assert actual.per_token.shape == actual.entropy.shape == (n,)
    if v == 1 or n == 0:
        assert actual.loss == 0
        assert (actual.grad_weight == 0).all()


@everywhere
def test_a_larger_teacher_vocabulary(where: Where) -> None:
    t = problem()
    cut = oracle(t)
    t["teacher_weight"] = torch.cat([t["teacher_weight"], 9 * torch.ones(6, 12)])
    t["student_weight"] = torch.cat([t["student_weight"], 9 * torch.ones(2, 8)])
    actual = ours(t, torch.float32, where, vocab_size=51)
    assert error(actual.per_token, cut.per_token) < 1e-5
    assert error(actual.grad_weight[:51], cut.grad_weight) < 1e-5
    assert (actual.grad_weight[51:] == 0).all()


@pytest.mark.parametrize("wanted", ["student_hidden", "student_weight", "student_bias"])
def test_each_gradient_alone(wanted: str) -> None:
    t = problem() | {"student_bias": torch.linspace(-1, 1, 51, dtype=torch.float64)}
    z = reference.logits(t["student_hidden"], t["student_weight"], t["student_bias"])
    z.requires_grad_()
    z_t = reference.logits(t["teacher_hidden"], t["teacher_weight"])
    reference.divergence(z, z_t).mean().backward()
    assert z.grad is not None
    expected = {
        "student_hidden": z.grad @ t["student_weight"],
        "student_weight": z.grad.T @ t["student_hidden"],
        "student_bias": z.grad.sum(0),
    }
    t[wanted] = t[wanted].clone().requires_grad_()
    linear_divergence(**t, chunk_tokens=3).loss.backward()
    assert t[wanted].grad is not None
    assert error(t[wanted].grad, expected[wanted]) < 1e-12


def test_fp16_gradients_do_not_underflow_under_small_weights() -> None:
    t = rounded(problem(n=64, v=500, d_s=64, d_t=64, noise=0.3), torch.float16)
    t["token_weights"] = torch.full((64,), 1 / 1_000_000, dtype=torch.float64)
    expected, actual = oracle(t), ours(t, torch.float16)
    assert error(actual.grad_weight.double() / 1e-6, expected.grad_weight / 1e-6) < 0.05  # fp16
    master = {k: v.float() for k, v in t.items()}
    w = master["student_weight"].requires_grad_()
    with torch.autocast("cpu", torch.float16):
        linear_divergence(**master).loss.backward()
    assert w.grad is not None
    assert error(w.grad, expected.grad_weight) < 0.005


def test_a_batch_split_in_two_gives_the_gradients_of_the_whole() -> None:
    t = problem(n=10)
    whole = ours(t)
    w = t["student_weight"].clone().requires_grad_()
    for rows in (slice(0, 3), slice(3, 10)):
        part = {k: v[rows] if k.endswith("hidden") else v for k, v in t.items()}
        weights = torch.full((len(part["student_hidden"]),), 0.1, dtype=torch.float64)
        linear_divergence(**part | {"student_weight": w}, token_weights=weights).loss.backward()
    assert w.grad is not None
    assert error(w.grad, whole.grad_weight) < 1e-13


def test_batched_and_strided_inputs() -> None:
    t = problem(n=12)
    expected = oracle(t)
    shaped = t | {k: v.view(3, 4, -1) for k, v in t.items() if k.endswith("hidden")}
    shaped["student_weight"] = t["student_weight"].T.contiguous().T
    shaped["teacher_hidden"] = shaped["teacher_hidden"].repeat(1, 1, 2)[..., ::2][..., :12]
    shaped["teacher_hidden"] = torch.stack([shaped["teacher_hidden"]] * 2, -1)[..., 0]
    h = torch.stack([shaped["student_hidden"]] * 2, -1)[..., 0].requires_grad_()
    shaped["teacher_hidden"].copy_(t["teacher_hidden"].view(3, 4, -1))
    weights = torch.full((3, 4), 1 / 12, dtype=torch.float64)
    out = linear_divergence(**shaped | {"student_hidden": h}, token_weights=weights)
    out.loss.backward()
    assert out.per_token.shape == (12,)
    assert error(out.loss, expected.loss) < 1e-12
    assert h.grad is not None
    assert error(h.grad.view(12, -1), expected.grad_hidden) < 1e-12


def test_autocast_multiplies_in_bf16_and_returns_gradients_in_fp32() -> None:
    t = rounded(problem(n=32, v=300, d_s=64, d_t=64), torch.bfloat16)  # some CPUs do not round
    t = {k: v.float() for k, v in t.items()}
    h = t["student_hidden"].clone().requires_grad_()
    w = t["student_weight"].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_divergence(**t | {"student_hidden": h, "student_weight": w})
    out.loss.backward()
    expected = oracle(t)
    assert h.grad is not None
    assert w.grad is not None
    assert h.grad.dtype == w.grad.dtype == torch.float32
    assert error(w.grad, expected.grad_weight) < 0.005  # of rounding dz
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    assert getattr(setting, "fp32_precision", "none") == "none"
