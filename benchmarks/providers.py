"""Everyone who computes this loss: the same call, the same tensors.

A provider maps (student_hidden, student_weight, teacher_hidden, teacher_weight) to the mean reverse
KL, differentiable in the first two; a `-mixture` to half of that and half of the mean forward KL.
One that a machine cannot run says why in `Unavailable`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from opcd_kernels import linear_divergence

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """Why a provider cannot run here."""


def ours(backend: str, forward_share: float = 0.0) -> Callable[[torch.device], Loss]:
    def make(device: torch.device) -> Loss:
        if backend != "torch" and device.type == "cpu" and not _interpreting():
            raise Unavailable("Triton needs a GPU")
        options = {"backend": backend, "forward_share": forward_share}
        return lambda *tensors: linear_divergence(*tensors, **options).loss

    return make


def plain_loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    """The five lines that everybody writes; faster than the reference, as it guards nothing."""
    s = (h_s @ w_s.T).log_softmax(-1)
    with torch.no_grad():
        t = (h_t @ w_t.T).log_softmax(-1)
    return (s.exp() * (s - t)).sum(-1).mean()


def plain_mixture(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    """The same of half the reverse KL and half the forward KL."""
    s = (h_s @ w_s.T).log_softmax(-1)
    with torch.no_grad():
        t = (h_t @ w_t.T).log_softmax(-1)
    return ((s.exp() - t.exp()) * (s - t)).sum(-1).mean() / 2


def plain(dtype: torch.dtype) -> Callable[[torch.device], Loss]:
    return lambda device: lambda *tensors: plain_loss(*(x.to(dtype) for x in tensors))


def plain_onednn(device: torch.device) -> Loss:
    """plain-fp32 with the products that ours takes on a CPU: in oneDNN, free to round to bf16."""
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    if device.type != "cpu" or not hasattr(setting, "fp32_precision"):
        raise Unavailable("for CPUs, with a torch that has mkldnn.matmul.fp32_precision")

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        before, setting.fp32_precision = setting.fp32_precision, "bf16"
        try:
            yield
        finally:
            setting.fp32_precision = before

    def loss(*tensors: Tensor) -> Tensor:
        return plain_loss(*(x.float() for x in tensors))

    loss.around = around  # forward and backward, see `gradients`
    return loss


def compiled(device: torch.device) -> Loss:
    """torch.compile of the plain formula with fp32 log-softmax, as a careful user writes it."""

    @torch.compile(dynamic=False)
    def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        s = (h_s @ w_s.T).float().log_softmax(-1)
        with torch.no_grad():
            t = (h_t @ w_t.T).float().log_softmax(-1)
        return (s.exp() * (s - t)).sum(-1).mean()

    return loss


def trl(device: torch.device) -> Loss:
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error

    def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        reverse_kl = 1.0
        return ChunkedDivergenceFunction.apply(h_s, w_s, None, h_t, w_t, None, reverse_kl)[0].mean()

    return loss


def liger_fused(device: torch.device) -> Loss:
    if device.type == "cpu" and not _interpreting():
        raise Unavailable("Triton needs a GPU")
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    module = LigerFusedLinearJSD(jsd_beta=1.0, accum_dtype=torch.float32)
    return lambda h_s, w_s, h_t, w_t: module(h_s, w_s, h_t, w_t, None)


def liger_chunked(device: torch.device) -> Loss:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    module = LigerFusedLinearJSDLoss(
        beta=1.0, weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=device.type == "cuda"
    )

    def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        labels = torch.zeros(len(h_s), dtype=torch.long, device=h_s.device)
        return module(h_s, w_s, h_t, w_t, labels)

    return loss


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


PROVIDERS: dict[str, Callable[[torch.device], Loss]] = {
    "ours-triton": ours("triton"),
    "ours-triton-dual": ours("triton_dual"),
    "ours-torch": ours("torch"),
    "ours-triton-mixture": ours("triton", forward_share=0.5),
    "ours-torch-mixture": ours("torch", forward_share=0.5),
    "plain-fp32": plain(torch.float32),
    "plain-fp32-onednn": plain_onednn,
    "plain-bf16": plain(torch.bfloat16),
    "torch.compile": compiled,
    "trl": trl,
    "liger-fused": liger_fused,
    "liger-chunked": liger_chunked,
}
OURS = tuple(name for name in PROVIDERS if name.startswith("ours"))


def definition(provider: str) -> Loss:
    """What a provider computes, to be evaluated in fp64."""
    return plain_mixture if provider.endswith("-mixture") else plain_loss


def tensors(
    n: int, d: int, v: int, device: torch.device, noise: float = 0.03, shared: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def gradients(loss: Loss, inputs: tuple[Tensor, ...], frozen: bool = False) -> list[Tensor]:
    """[loss, gradient of the hidden states, gradient of the head unless it is frozen]."""
    h = inputs[0].detach().requires_grad_()
    w = inputs[1].detach().requires_grad_(not frozen)
    with getattr(loss, "around", contextlib.nullcontext)():
        value = loss(h, w, *inputs[2:])
        value.backward()
    return [value.detach(), *(x.grad for x in (h, w) if x.grad is not None)]


def gradient_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """The larger relative error (2-norm) of the gradients."""
    pairs = zip(actual[1:], exact[1:], strict=True)
    return max(((a.double() - e).norm() / e.norm()).item() for a, e in pairs)
