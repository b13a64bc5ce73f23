"""The chunked loss, against the reference in fp64 and against plain PyTorch in the same dtype."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opcd_kernels import linear_divergence, reference

DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]


def problem(
    n: int = 7, v: int = 51, d_s: int = 8, d_t: int = 12, noise: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """Student and teacher of different widths; `noise` sets how far apart they are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h_s, w_s = normal(n, d_s), normal(v, d_s)
    mix = normal(d_s, d_t) / d_s**0.5
    h_t = h_s @ mix + noise * 0.1 * normal(n, d_t)
    w_t = w_s @ torch.linalg.pinv(mix).T + noise * 0.1 * normal(v, d_t)
    return {
        "student_hidden": h_s,
        "student_weight": w_s,
        "teacher_hidden": h_t,
        "teacher_weight": w_t,
    }


def oracle(tensors: dict[str, Tensor], dtype: torch.dtype = torch.float64, **options: Any) -> tuple:
    """Loss, per-token values and gradients by plain autograd on full logits in `dtype`."""
    t = {k: v.detach().to(dtype) for k, v in tensors.items()}
    h = t["student_hidden"].clone().requires_grad_()
    w = t["student_weight"].clone().requires_grad_()
    v = options.get("vocab_size") or len(w)
    temperature = options.get("temperature", 1.0)
    z_s = reference.logits(
        h,
        w[:v],
        None if "student_bias" not in t else t["student_bias"][:v],
        options.get("student_softcap"),
        temperature,
    )
    z_t = reference.logits(
        t["teacher_hidden"],
        t["teacher_weight"][:v],
        None if "teacher_bias" not in t else t["teacher_bias"][:v],
        options.get("teacher_softcap"),
        temperature,
    )
    per_token = reference.divergence(
        z_s, z_t, options.get("divergence", "reverse_kl"), options.get("beta", 0.5)
    )
    weights = t.get("token_weights", torch.full((len(h),), 1 / len(h), dtype=dtype))
    loss = (weights * per_token).sum()
    loss.backward()
    return loss.detach(), per_token.detach(), reference.entropy(z_s).detach(), h.grad, w.grad


def ours(tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> tuple:
    keep = {"token_weights"}
    t = {k: v.detach().to(v.dtype if k in keep else dtype) for k, v in tensors.items()}
    t["student_hidden"].requires_grad_()
    t["student_weight"].requires_grad_()
    out = linear_divergence(**t, **options)
    out.loss.backward()
    grads = t["student_hidden"].grad, t["student_weight"].grad
    return out.loss.detach(), out.per_token, out.student_entropy, *grads


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def assert_exact(tensors: dict[str, Tensor], **options: Any) -> None:
    reduced = {k: v for k, v in options.items() if k not in ("chunk_tokens",)}
    expected = oracle(tensors, **reduced)
    for a, e in zip(ours(tensors, torch.float64, **options), expected, strict=True):
        assert error(a, e) < 1e-11


@pytest.mark.parametrize(
    ("divergence", "chunk_tokens"), itertools.product(DIVERGENCES, [None, 1, 3, 100])
)
def test_equals_the_reference(divergence: str, chunk_tokens: int | None) -> None:
    assert_exact(problem(), divergence=divergence, beta=0.3, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_option_together(divergence: str) -> None:
    tensors = problem()
    generator = torch.Generator().manual_seed(1)
    tensors["teacher_weight"] = torch.cat([tensors["teacher_weight"], torch.ones(5, 12)])
    tensors["student_bias"] = torch.randn(51, generator=generator, dtype=torch.float64)
    tensors["teacher_bias"] = torch.randn(56, generator=generator, dtype=torch.float64)
    tensors["token_weights"] = torch.rand(7, generator=generator, dtype=torch.float64)
    assert_exact(
        tensors,
        divergence=divergence,
        beta=0.8,
        temperature=0.6,
        student_softcap=3.0,
        teacher_softcap=4.0,
        vocab_size=40,
        chunk_tokens=2,
    )


def test_gradient_of_the_bias() -> None:
    t = problem()
    bias = torch.zeros(51, dtype=torch.float64, requires_grad=True)
    linear_divergence(**t, student_bias=bias).loss.backward()
    z = reference.logits(t["student_hidden"], t["student_weight"]).requires_grad_()
    z_t = reference.logits(t["teacher_hidden"], t["teacher_weight"])
    reference.divergence(z, z_t).mean().backward()
    assert bias.grad is not None
    assert z.grad is not None
    assert error(bias.grad, z.grad.sum(0)) < 1e-12


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_bf16_is_at_least_as_accurate_as_plain_pytorch(
    divergence: str, noise: float, device: str
) -> None:
    tensors = problem(n=64, v=500, d_s=64, d_t=64, noise=noise)
    # The same numbers for all.
    tensors = {k: v.bfloat16().double().to(device) for k, v in tensors.items()}
    expected = oracle(tensors, divergence=divergence)
    plain = oracle(tensors, torch.bfloat16, divergence=divergence)
    actual = ours(tensors, torch.bfloat16, divergence=divergence)
    for a, p, e in zip(actual, plain, expected, strict=True):
        assert error(a, e) <= 2 * error(p, e) + 1e-7
    assert error(actual[3], expected[3]) < 0.005
    assert error(actual[4], expected[4]) < 0.005
    assert error(actual[1], expected[1]) < 0.01
    assert (actual[1] >= 0).all()


def test_fp32_keeps_its_digits_where_the_models_are_nearly_equal() -> None:
    tensors = problem(n=16, v=2000, d_s=32, d_t=32, noise=3e-4)
    tensors = {k: v.float().double() for k, v in tensors.items()}
    expected, actual = oracle(tensors), ours(tensors, torch.float32)
    assert expected[1].mean() < 1e-5
    assert error(actual[1], expected[1]) < 0.01
    assert (actual[1] >= 0).all()


def test_fp16_gradients_do_not_underflow_under_small_weights() -> None:
    tensors = problem(n=64, v=500, d_s=64, d_t=64, noise=0.3)
    tensors = {k: v.half().double() for k, v in tensors.items()}
    tensors["token_weights"] = torch.full((64,), 1 / 1_000_000, dtype=torch.float64)
    expected, actual = oracle(tensors), ours(tensors, torch.float16)
    assert error(actual[4].double() / 1e-6, expected[4] / 1e-6) < 0.05  # stored as fp16
    master = {k: v.float() for k, v in tensors.items()}
    w = master["student_weight"].requires_grad_()
    with torch.autocast("cpu", torch.float16):
        linear_divergence(**master).loss.backward()
    assert w.grad is not None
    assert error(w.grad, expected[4]) < 0.005


def test_no_gradient_work_where_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    t = problem()
    t["student_weight"].requires_grad_()
    monkeypatch.setattr(torch, "zeros", None)  # where the gradient of the head is allocated
    with torch.no_grad():
        out = linear_divergence(**t)
    assert not out.loss.requires_grad
    with pytest.raises(TypeError):
        linear_divergence(**t)


def test_a_shift_of_all_logits_changes_nothing() -> None:
    t = problem()
    shift = torch.full((51,), 300.0, dtype=torch.float64)
    plain = ours(t, torch.float32)
    moved = ours(t | {"student_bias": shift, "teacher_bias": shift}, torch.float32)
    assert error(moved[3], plain[3]) < 1e-3


def test_impossible_tokens() -> None:
    t = problem(n=2, v=5)
    both = torch.tensor([0, 0, 0, 0, -torch.inf], dtype=torch.float64)
    loss, per_token, entropy, grad_h, grad_w = ours(
        t | {"student_bias": both, "teacher_bias": both}, torch.float64
    )
    cut = t | {k: t[k][:4] for k in ("student_weight", "teacher_weight")}
    assert error(per_token, oracle(cut)[1]) < 1e-12
    assert error(grad_h, oracle(cut)[3]) < 1e-12
    assert torch.isfinite(entropy).all()
    assert torch.isfinite(loss)
    assert (grad_w[4] == 0).all()
    only_teacher = linear_divergence(**t, teacher_bias=both)
    assert (only_teacher.per_token == torch.inf).all()


def test_a_token_of_weight_zero_counts_for_nothing_even_if_infinite() -> None:
    t = problem(n=3)
    t["teacher_hidden"][1] = torch.nan
    t["student_hidden"][1] = torch.inf
    weights = torch.tensor([0.5, 0.0, 0.5])
    kept = {k: v[[0, 2]] if k.endswith("hidden") else v for k, v in t.items()}
    actual = ours(t | {"token_weights": weights}, torch.float64)
    expected = oracle(kept)
    assert error(actual[0], expected[0]) < 1e-12
    assert error(actual[3][[0, 2]], expected[3]) < 1e-12
    assert (actual[3][1] == 0).all()
    assert error(actual[4], expected[4]) < 1e-12


@pytest.mark.parametrize(("n", "v"), [(0, 5), (1, 1), (1, 7)])
def test_smallest_shapes(n: int, v: int) -> None:
    loss, per_token, entropy, grad_h, grad_w = ours(problem(n=n, v=v), torch.float64)
    assert per_token.shape == entropy.shape == (n,)
    assert grad_h.shape == (n, 8)
    assert grad_w.shape == (v, 8)
    if v == 1 or n == 0:
        assert loss == 0
        assert (grad_w == 0).all()


def test_a_batch_split_in_two_gives_the_gradients_of_the_whole() -> None:
    t = problem(n=10)
    whole = ours(t, torch.float64)
    w = t["student_weight"].clone().requires_grad_()
    for rows in (slice(0, 3), slice(3, 10)):
        part = {k: v[rows] if k.endswith("hidden") else v for k, v in t.items()}
        weights = torch.full((len(part["student_hidden"]),), 0.1)
        linear_divergence(**part | {"student_weight": w}, token_weights=weights).loss.backward()
    assert w.grad is not None
    assert error(w.grad, whole[4]) < 1e-7


def test_upstream_gradient_scales_and_backward_twice_agrees() -> None:
    t = problem()
    h = t["student_hidden"].clone().requires_grad_()
    loss = linear_divergence(**t | {"student_hidden": h}).loss
    (once,) = torch.autograd.grad(loss, h, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * -3, h, retain_graph=True)
    (again,) = torch.autograd.grad(loss, h)
    assert torch.equal(once, again)
    assert error(scaled, -3 * once) < 1e-15


def test_second_derivatives_raise() -> None:
    t = problem()
    h = t["student_hidden"].requires_grad_()
    loss = linear_divergence(**t).loss
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_batched_and_strided_inputs() -> None:
    t = problem(n=12)
    expected = oracle(t)
    shaped = t | {k: v.view(3, 4, -1) for k, v in t.items() if k.endswith("hidden")}
    shaped["student_weight"] = t["student_weight"].T.contiguous().T
    out = linear_divergence(**shaped, token_weights=torch.full((3, 4), 1 / 12))
    assert out.per_token.shape == (12,)
    assert error(out.loss, expected[0]) < 1e-7


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                LargestTensor.largest = max(LargestTensor.largest, value.numel())
        return result


def test_full_logits_never_exist() -> None:
    t = problem(n=256, v=997)
    LargestTensor.largest = 0
    with LargestTensor():
        linear_divergence(**t, chunk_tokens=16)
    assert LargestTensor.largest <= 16 * 997


def test_autocast_multiplies_in_bf16_and_returns_gradients_in_fp32() -> None:
    t = {k: v.bfloat16().float() for k, v in problem(n=32, v=300, d_s=64, d_t=64).items()}
    h = t["student_hidden"].clone().requires_grad_()
    w = t["student_weight"].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_divergence(**t | {"student_hidden": h, "student_weight": w})
    out.loss.backward()
    expected = oracle({k: v.double() for k, v in t.items()})
    assert h.grad is not None
    assert w.grad is not None
    assert h.grad.dtype == w.grad.dtype == torch.float32
    assert error(out.per_token, expected[1]) < 1e-3
    assert error(w.grad, expected[4]) < 0.005


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_hidden": torch.ones(6, 12)}, "same tokens"),
        ({"student_weight": torch.ones(8, 51)}, "untransposed"),
        ({"teacher_weight": torch.ones(60, 12)}, "vocab_size=51"),
        ({"vocab_size": 52}, "between 1 and 51"),
        ({"token_weights": torch.ones(6)}, "7 tokens"),
        ({"divergence": "kl"}, "reverse_kl, forward_kl, jsd"),
        ({"beta": 1.0}, "strictly between"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"student_softcap": -1.0}, "student_softcap must be positive"),
        ({"student_bias": torch.ones(3)}, "student_bias must be"),
        ({"backend": "fast"}, "backend must be"),
        ({"chunk_tokens": 0}, "chunk_tokens must be"),
        ({"student_hidden": torch.ones(7, 8, dtype=torch.int8)}, "floating point"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    tensors = {k: v.float() for k, v in problem().items()}
    with pytest.raises(ValueError, match=message):
        linear_divergence(**tensors | change)
