"""Gradients of tokens of which a model is sure: their entries are small, and sum to 0."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from opcd_kernels import rows_torch
from opcd_kernels.options import Options
from opcd_kernels.rows import Rows
from tests.opcd_kernels.problems import WHERE, Where

BETA, SHARE = 0.3, 0.4
CONFIDENCE = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
SPREAD = (0.0, 1.0, 2.0, 4.0)  # standard deviation of the other logits
APART = (0.01, 0.3)  # of student's and teacher's
# What fp32 logarithms leave of a gradient between models that are 0.01 apart.
NOISE = 2e-4


def logits(v: int, confidence: float, spread: float, apart: float) -> tuple[Tensor, Tensor]:
    """Student's and teacher's (2, V) in fp32, each with one entry that it is sure of."""
    generator = torch.Generator().manual_seed(0)
    z_s = torch.randn(2, v, generator=generator, dtype=torch.float64) * spread
    z_t = z_s + apart * torch.randn(2, v, generator=generator, dtype=torch.float64)
    for z in (z_s, z_t):
        z[:, 1] = torch.logsumexp(z[:, 2:], -1) + math.log(confidence / (1 - confidence))
    z_t[:, 1] += apart
    return z_s.float(), z_t.float()


def plain(z_s: Tensor, z_t: Tensor, divergence: str, dtype: torch.dtype) -> Tensor:
    """The gradient by autograd."""
    z_s = z_s.to(dtype, copy=True).requires_grad_()
    log_s, log_t = z_s.log_softmax(-1), z_t.to(dtype).log_softmax(-1)
    reverse = (log_s.exp() * (log_s - log_t)).sum()
    forward = (log_t.exp() * (log_t - log_s)).sum()
    if divergence == "jsd":
        log_m = torch.logaddexp(log_s + math.log(1 - BETA), log_t + math.log(BETA))
        value = BETA * (log_t.exp() * (log_t - log_m)).sum()
        value = value + (1 - BETA) * (log_s.exp() * (log_s - log_m)).sum()
    else:
        share = {"reverse_kl": 0.0, "forward_kl": 1.0, "mixture": SHARE}[divergence]
        value = (1 - share) * reverse + share * forward
    return torch.autograd.grad(value, z_s)[0]


def ours(z_s: Tensor, z_t: Tensor, divergence: str, where: Where, dtype: torch.dtype) -> Tensor:
    n, v = z_s.shape
    backend = rows_torch
    if where.backend == "triton":
        backend = pytest.importorskip("opcd_kernels.rows_triton")
    device = where.device

    def padded(z: Tensor) -> Tensor:
        whole = torch.full((n, backend.row_width(v)), -math.inf, device=device)
        whole[:, :v] = z
        return whole[:, :v]

    shares = torch.full((n,), SHARE, device=device) if divergence == "mixture" else None
    rows = Rows(torch.ones(n, device=device), shares)
    options = Options(divergence, BETA, 1.0, None, None, v)
    found = backend.divergence_rows_(
        padded(z_s), padded(z_t), None, None, rows, options, True, dtype
    )
    return found.dz.float().cpu()


def error(found: Tensor, exact: Tensor) -> float:
    """The largest of both tokens', relative to the gradient."""
    return float(((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "mixture"])
@pytest.mark.parametrize("where", WHERE)
def test_the_error_is_at_most_twice_that_of_fp32_logits(
    where: Where, divergence: str, dtype: torch.dtype
) -> None:
    """Rounded to the products' dtype as ours is, over confidence, flatness and vocabulary."""
    interpreted = where.backend == "triton" and where.device == "cpu"
    sizes = (1000,) if interpreted else (1000, 32000, 151936)
    cells = [*product(sizes, CONFIDENCE, SPREAD, APART)]
    if interpreted:
        cells = [*cells[::3], (32000, 0.9999, 2.0, 0.01)]
    if where.backend == "torch" and dtype == torch.bfloat16:
        return  # rounded by the products
    for v, confidence, spread, apart in cells:
        z_s, z_t = logits(v, confidence, spread, apart)
        exact = plain(z_s, z_t, divergence, torch.float64)
        allowed = error(plain(z_s, z_t, divergence, torch.float32).to(dtype), exact)
        found = error(ours(z_s, z_t, divergence, where, dtype), exact)
        assert found <= max(2 * allowed, NOISE), (v, confidence, spread, apart, found, allowed)
