"""Everyone who computes this loss: the same call, the same tensors.

A provider is made for a device and a divergence. Its loss maps (student_hidden, student_weight,
teacher_hidden, teacher_weight) to the mean over the tokens, differentiable in the first two. One
that a machine cannot run, or that lacks a divergence, says why in `Unavailable`.

    ours-…              opcd_kernels, by backend
    plain-fp32, -bf16   the formula over whole logits, as everybody writes it
    plain-fp32-onednn   the first with the products that ours takes on a CPU
    plain-checkpointed  what an expert writes without a kernel: fp32 logits of a chunk of tokens at
                        a time, checkpointed, compiled, products as fast as fp32 results allow
    torch.compile       the formula compiled, logits rounded to bf16 by their product
    trl, liger-…        TRL's and Liger's losses
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opcd_kernels import linear_divergence
from opcd_kernels.backends import check_backend

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "mixture")
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # TRL's and Liger's
CHECKPOINTED_TOKENS = {"cuda": 1024, "cpu": 256}  # a chunk of plain-checkpointed
SLAB = 8192  # rows of a head that are widened to fp64 at a time
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """Why a provider cannot run here."""


class Provider(NamedTuple):
    """One who computes the loss."""

    loss: Loss
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext  # forward and backward
    takes_fp32_head: bool = False  # under autocast; the others are given a cast one


Make = Callable[[torch.device, str], Provider]


def divergence_of(s: Tensor, t: Tensor, divergence: str) -> Tensor:
    """(N, V) log-probabilities of student and teacher → (N,)."""
    if divergence == "reverse_kl":
        return (s.exp() * (s - t)).sum(-1)
    if divergence == "forward_kl":
        return (t.exp() * (t - s)).sum(-1)
    if divergence == "mixture":  # half of either
        return ((s.exp() - t.exp()) * (s - t)).sum(-1) / 2
    m = torch.logaddexp(s, t) - math.log(2)
    return (s.exp() * (s - m) + t.exp() * (t - m)).sum(-1) / 2


def ours(backend: str) -> Make:
    def make(device: torch.device, divergence: str) -> Provider:
        mixed = divergence == "mixture"
        try:
            check_backend(backend, device, torch.bfloat16, not mixed)
        except ValueError as reason:
            raise Unavailable(str(reason)) from reason
        how: dict[str, Any] = {"divergence": "reverse_kl" if mixed else divergence}
        how |= {"backend": backend, "forward_share": 0.5 if mixed else 0.0}

        def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
            into_grad = w_s.is_leaf and w_s.grad is not None
            return linear_divergence(h_s, w_s, h_t, w_t, add_weight_grad=into_grad, **how).loss

        return Provider(loss, takes_fp32_head=True)

    return make


def plain(dtype: torch.dtype) -> Make:
    """The few lines that everybody writes; faster than the reference, as they guard nothing."""

    def make(device: torch.device, divergence: str) -> Provider:
        def loss(*tensors: Tensor) -> Tensor:
            h_s, w_s, h_t, w_t = (x.to(dtype) for x in tensors)
            s = (h_s @ w_s.T).log_softmax(-1)
            with torch.no_grad():
                t = (h_t @ w_t.T).log_softmax(-1)
            return divergence_of(s, t, divergence).mean()

        return Provider(loss)

    return make


def plain_onednn(device: torch.device, divergence: str) -> Provider:
    if device.type != "cpu":
        raise Unavailable("for CPUs")
    loss = plain(torch.float32)(device, divergence).loss
    return Provider(loss, around=fast_fp32_products(device))


def fast_fp32_products(device: torch.device) -> Callable[[], AbstractContextManager]:
    """Products of fp32 numbers may round them: to TF32 on a GPU, in oneDNN to bf16.

    Numbers that came from bf16 lose nothing, and sums stay in fp32.
    """
    kind = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    setting: Any = getattr(kind, "matmul", None)
    if not hasattr(setting, "fp32_precision"):
        raise Unavailable("needs a torch that has matmul.fp32_precision (2.9)")
    value = "tf32" if device.type == "cuda" else "bf16"

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        before, setting.fp32_precision = setting.fp32_precision, value
        try:
            yield
        finally:
            setting.fp32_precision = before

    return around


def plain_checkpointed(device: torch.device, divergence: str) -> Provider:
    tokens = CHECKPOINTED_TOKENS[device.type]

    @torch.compile(dynamic=False)
    def of_chunk(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        s = (h_s @ w_s.T).log_softmax(-1)
        with torch.no_grad():
            t = (h_t @ w_t.T).log_softmax(-1)
        return divergence_of(s, t, divergence).sum()

    def loss(*tensors: Tensor) -> Tensor:
        # Once, so that the chunks' gradients add up in fp32.
        h_s, w_s, h_t, w_t = (x.float() for x in tensors)
        total = h_s.new_zeros(())
        for a, b in zip(h_s.split(tokens), h_t.split(tokens), strict=True):
            total = total + checkpoint(of_chunk, a, w_s, b, w_t, use_reentrant=False)
        return total / len(h_s)

    return Provider(loss, around=fast_fp32_products(device))


def compiled(device: torch.device, divergence: str) -> Provider:
    """fp32 log-softmax of bf16 logits, as a careful user writes it."""

    @torch.compile(dynamic=False)
    def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        s = (h_s @ w_s.T).float().log_softmax(-1)
        with torch.no_grad():
            t = (h_t @ w_t.T).float().log_softmax(-1)
        return divergence_of(s, t, divergence).mean()

    return Provider(loss)


def trl(device: torch.device, divergence: str) -> Provider:
    beta = _beta(divergence)
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error

    def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        return ChunkedDivergenceFunction.apply(h_s, w_s, None, h_t, w_t, None, beta)[0].mean()

    return Provider(loss)


def liger_fused(device: torch.device, divergence: str) -> Provider:
    beta = _beta(divergence)
    try:  # its kernels need what ours need
        check_backend("triton", device, torch.bfloat16, True)
    except ValueError as reason:
        raise Unavailable("Triton needs a GPU") from reason
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    module = LigerFusedLinearJSD(jsd_beta=beta, accum_dtype=torch.float32)
    return Provider(lambda h_s, w_s, h_t, w_t: module(h_s, w_s, h_t, w_t, None))


def liger_chunked(device: torch.device, divergence: str) -> Provider:
    beta = _beta(divergence)
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    module = LigerFusedLinearJSDLoss(
        beta=beta, weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=device.type == "cuda"
    )

    def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        labels = torch.zeros(len(h_s), dtype=torch.long, device=h_s.device)
        return module(h_s, w_s, h_t, w_t, labels)

    return Provider(loss)


def _beta(divergence: str) -> float:
    if divergence not in BETAS:
        raise Unavailable("has no mixture of both KL")
    return BETAS[divergence]


PROVIDERS: dict[str, Make] = {
    "ours-triton": ours("triton"),
    "ours-triton-dual": ours("triton_dual"),
    "ours-torch": ours("torch"),
    "plain-fp32": plain(torch.float32),
    "plain-fp32-onednn": plain_onednn,
    "plain-bf16": plain(torch.bfloat16),
    "plain-checkpointed": plain_checkpointed,
    "torch.compile": compiled,
    "trl": trl,
    "liger-fused": liger_fused,
    "liger-chunked": liger_chunked,
}
OURS = tuple(name for name in PROVIDERS if name.startswith("ours"))


def tensors(
    n: int, d: int, v: int, device: torch.device, noise: float = 0.03, shared: bool = False
) -> Inputs:
    """bf16 hidden states and heads of a teacher and a student that is `noise` away from it.

    The heads hold the same numbers; `shared`: in the same memory, as where the head is frozen.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    h_s, w_s = normal(n, d), normal(v, d) * (2.4 / d**0.5)
    h_t = h_s + noise * normal(n, d)
    h_s, w, h_t = (x.bfloat16() for x in (h_s, w_s, h_t))
    return h_s, w, h_t, w if shared else w.clone()


def gradients(provider: Provider, inputs: Inputs, frozen: bool = False) -> list[Tensor]:
    """[loss, gradient of the hidden states, gradient of the head unless it is frozen]."""
    w = inputs[1].detach().requires_grad_(not frozen)
    found = _passed(provider, inputs, w)
    return found if w.grad is None else [*found, w.grad]


def in_a_step(provider: Provider, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """A pass of a training step: the head a weight in fp32 under autocast, its `.grad` there.

    Each call adds to that, and returns what `gradients` does, of the first call alone the same.
    Who takes no such head is given a cast one, whose gradient autograd widens and adds.
    """
    device, own = inputs[0].device.type, provider.takes_fp32_head
    w = inputs[1].float().requires_grad_()
    w.grad = torch.zeros_like(w)

    def call() -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=own):
            found = _passed(provider, inputs, w if own else w.bfloat16())
        assert w.grad is not None
        return [*found, w.grad]

    return call


def _passed(provider: Provider, inputs: Inputs, w: Tensor) -> list[Tensor]:
    """[loss, gradient of the hidden states] of a pass with a head."""
    h = inputs[0].detach().requires_grad_()
    with provider.around():
        value = provider.loss(h, w, *inputs[2:])
        value.backward()
    assert h.grad is not None
    return [value.detach(), h.grad]


def exact_gradients(inputs: Inputs, divergence: str, frozen: bool = False) -> list[Tensor]:
    """What `gradients` should find: the plain formula on fp64 logits.

    The heads are widened a slab at a time, and the gradient of the head is kept in fp32, since two
    heads in fp64 and their graph would not fit a small GPU.
    """
    h_s, w_s, h_t, w_t = inputs
    h = h_s.double()
    slabs = [slice(i, i + SLAB) for i in range(0, len(w_s), SLAB)]

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([hidden @ weight[rows].double().T for rows in slabs], 1)

    z_s, z_t = logits(h, w_s).requires_grad_(), logits(h_t.double(), w_t)
    value = divergence_of(z_s.log_softmax(-1), z_t.log_softmax(-1), divergence).mean()
    (dz,) = torch.autograd.grad(value, z_s)
    grad_h = torch.zeros_like(h)
    grad_w = torch.empty(w_s.shape, device=h.device)
    for rows in slabs:
        grad_h += dz[:, rows] @ w_s[rows].double()
        if not frozen:
            grad_w[rows] = dz[:, rows].T @ h
    return [value.detach(), grad_h, *([] if frozen else [grad_w])]


def gradient_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """The larger relative error (2-norm) of the gradients."""
    pairs = zip(actual[1:], exact[1:], strict=True)
    return max((_distance(a, e) / _distance(e, torch.zeros_like(e))).item() for a, e in pairs)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """2-norm, in fp64 a slab at a time."""
    parts = zip(a.split(SLAB), b.split(SLAB), strict=True)
    return torch.stack([(x.double() - y.double()).norm() for x, y in parts]).norm()
