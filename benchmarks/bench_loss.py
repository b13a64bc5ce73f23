"""Loss and gradients of one lm_head: ours against plain PyTorch with full logits.

SmolLM2's head (D 576, V 49152), bf16 inputs, student and teacher nearly equal as in training. Each
provider's gradient is compared with fp64 before it is timed; the error goes into `extra_info`.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opcd_kernels import linear_divergence, reference

N, D, V = 256, 576, 49152
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


def ours(h: Tensor, w: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    return linear_divergence(h, w, h_t, w_t).loss


def plain(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def loss(h: Tensor, w: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        student = reference.logits(h.to(dtype), w.to(dtype))
        teacher = reference.logits(h_t.to(dtype), w_t.to(dtype))
        return reference.divergence(student, teacher).mean()

    return loss


PROVIDERS = {"ours": ours, "plain-bf16": plain(torch.bfloat16), "plain-fp32": plain(torch.float32)}


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=generator)
    w = torch.randn(V, D, generator=generator) * 0.1
    h_t = h + 0.03 * torch.randn(N, D, generator=generator)
    w_t = w + 0.001 * torch.randn(V, D, generator=generator)
    return tuple(x.bfloat16() for x in (h, w, h_t, w_t))


def gradients(loss: Callable[..., Tensor], tensors: Tensors) -> tuple[Tensor, Tensor]:
    h, w = (x.clone().requires_grad_() for x in tensors[:2])
    loss(h, w, *tensors[2:]).backward()
    return h.grad, w.grad


@pytest.fixture(scope="module")
def expected(tensors: Tensors) -> tuple[Tensor, Tensor]:
    double = tuple(x.double() for x in tensors)
    return gradients(plain(torch.float64), double)


@pytest.mark.parametrize("name", PROVIDERS)
def test_loss(benchmark: Callable, name: str, tensors: Tensors, expected: tuple) -> None:
    error = max(
        ((a.double() - e).norm() / e.norm()).item()
        for a, e in zip(gradients(PROVIDERS[name], tensors), expected, strict=True)
    )
    benchmark.extra_info |= {"gradient_error": error, "N": N, "D": D, "V": V, "inputs": "bf16"}
    if name == "ours":
        assert error < 0.005, "wrong: not timed"
    benchmark.pedantic(gradients, (PROVIDERS[name], tensors), rounds=7, warmup_rounds=1)
