"""Problems for the loss, their solution by plain autograd, and where the loss can be computed."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from opcd_kernels import backends, linear_divergence, reference

# Numbers of tokens, which are not rounded with the others.
OF_TOKENS = ("token_weights", "forward_share", "target_ids", "logprob_weights")
DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]
Tensors = dict[str, Tensor]


class Where(NamedTuple):
    backend: str
    device: str


def no_dual_product() -> str:
    """Why this machine's GPU cannot run the dual product; "" if it can."""
    if torch.cuda.is_available() and not backends.runs_dual(torch.device("cuda")):
        return f"{torch.cuda.get_device_name()} does not have what the dual product needs"
    return ""


DUAL_ON_CUDA = pytest.param(
    Where("triton_dual", "cuda"),
    id="cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(bool(no_dual_product()), reason=no_dual_product()),
    ],
)
WHERE = [
    pytest.param(Where("torch", "cpu"), id="torch-cpu"),
    pytest.param(
        Where("triton", "cpu"),
        id="triton-interpreted",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here"),
    ),
    pytest.param(Where("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
    pytest.param(Where("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
]


class Solution(NamedTuple):
    loss: Tensor
    per_token: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def problem(
    n: int = 7, v: int = 51, d_s: int = 8, d_t: int = 12, noise: float = 1.0, seed: int = 0
) -> Tensors:
    """Student and teacher of different widths, in fp64; `noise` sets how far apart they are."""
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


def rounded(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The same numbers for every precision: those that `dtype` can hold, in fp64."""
    return {k: v if k in OF_TOKENS else v.to(dtype).double() for k, v in tensors.items()}


def oracle(tensors: Tensors, dtype: torch.dtype = torch.float64, **options: Any) -> Solution:
    """By plain autograd on full logits in `dtype`."""
    t = {k: v.detach().cpu() for k, v in tensors.items()}
    t |= {k: v.to(dtype) for k, v in t.items() if k != "target_ids"}
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
        z_s,
        z_t,
        options.get("divergence", "reverse_kl"),
        options.get("beta", 0.5),
        t.get("forward_share", options.get("forward_share", 0.0)),
    )
    weights = t.get("token_weights", torch.full((len(h),), 1 / max(len(h), 1), dtype=dtype))
    loss = (weights * per_token).sum()
    if "logprob_weights" in t:
        loss = loss - (t["logprob_weights"] * reference.logprobs(z_s, t["target_ids"])).sum()
    loss.backward()
    assert h.grad is not None
    assert w.grad is not None
    entropy = reference.entropy(z_s).detach()
    return Solution(loss.detach(), per_token.detach(), entropy, h.grad, w.grad)


def ours(
    tensors: Tensors,
    dtype: torch.dtype = torch.float64,
    where: Where = Where("torch", "cpu"),  # noqa: B008, a constant
    **options: Any,
) -> Solution:
    """By `linear_divergence`; the results come back to the CPU."""
    t = {k: v if k in OF_TOKENS else v.detach().to(where.device, dtype) for k, v in tensors.items()}
    t["student_hidden"].requires_grad_()
    t["student_weight"].requires_grad_()
    out = linear_divergence(**t, backend=where.backend, **options)
    out.loss.backward()
    grads = t["student_hidden"].grad, t["student_weight"].grad
    return Solution(*(x.detach().cpu() for x in (*out[:3], *grads)))


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm."""
    expected = expected.double().cpu()
    difference = (actual.double().cpu() - expected).norm()
    return (difference / expected.norm().clamp_min(1e-300)).item()


def assert_as_exact_as_plain(
    tensors: Tensors, dtype: torch.dtype, where: Where, **options: Any
) -> Solution:
    """Every result is at most twice as far from fp64 as plain PyTorch in the same dtype."""
    tensors = rounded(tensors, dtype)
    mathematical = {k: v for k, v in options.items() if k != "chunk_tokens"}
    expected = oracle(tensors, **mathematical)
    plain = oracle(tensors, dtype, **mathematical)
    actual = ours(tensors, dtype, where, **options)
    digits = torch.finfo(torch.float32).eps
    for name, a, p, e in zip(Solution._fields, actual, plain, expected, strict=True):
        assert error(a, e) <= 2 * error(p, e) + 4 * digits, name
    return actual
