"""Gradients of tokens of which a model is sure: their entries are small, and sum to 0.

    python -m benchmarks.confidence     # the table in docs/derivation.md

The worst relative error (2-norm, against fp64) of a token's gradient in the logits, from fp32 rows,
over how sure both models are of one entry, the spread of the other logits, the distance of the
models and the vocabulary. Triton is interpreted where there is no GPU, on the smallest vocabulary.
"""

import importlib
import math
import os
from itertools import product
from types import ModuleType

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from opcd_kernels.options import Options
from opcd_kernels.rows import Rows, empty_found

BETA, SHARE = 0.3, 0.4
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "mixture")
VOCABULARIES = (1000, 32000, 151936)
CONFIDENCE = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
SPREAD = (0.0, 1.0, 2.0, 4.0)  # standard deviation of the other logits
APART = (0.01, 0.3)  # of student's and teacher's


def cells(vocabularies: tuple[int, ...]) -> list[tuple[int, float, float, float]]:
    """Vocabulary, confidence, spread and distance."""
    return [*product(vocabularies, CONFIDENCE, SPREAD, APART)]


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


def ours(
    z_s: Tensor, z_t: Tensor, divergence: str, backend: ModuleType, device: str, dtype: torch.dtype
) -> Tensor:
    """The gradient by `rows_torch` or `rows_triton`, in a dtype."""
    n, v = z_s.shape

    def padded(z: Tensor) -> Tensor:
        whole = torch.full((n, backend.row_width(v)), -math.inf, device=device)
        whole[:, :v] = z
        return whole[:, :v]

    shares = torch.full((n,), SHARE, device=device) if divergence == "mixture" else None
    rows = Rows(torch.ones(n, device=device), shares)
    options = Options(divergence, BETA, 1.0, None, None, v)
    dz = torch.empty(n, backend.row_width(v), device=device, dtype=dtype)[:, :v]
    found = empty_found(dz, rows)
    backend.divergence_rows_(padded(z_s), padded(z_t), None, None, rows, found, options, True)
    return found.dz.float().cpu()


def error(found: Tensor, exact: Tensor) -> float:
    """The largest of both tokens', relative to the gradient."""
    return float(((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def worst(divergence: str, name: str, device: str) -> float:
    """Of all cells that a way of computing is asked for."""
    interpreted = name == "rows_triton" and device == "cpu"
    backend = None if name == "plain" else importlib.import_module(f"opcd_kernels.{name}")
    errors = []
    for cell in cells(VOCABULARIES[:1] if interpreted else VOCABULARIES):
        z_s, z_t = logits(*cell)
        exact = plain(z_s, z_t, divergence, torch.float64)
        if backend is None:
            found = plain(z_s, z_t, divergence, torch.float32)
        else:
            found = ours(z_s, z_t, divergence, backend, device, torch.float32)
        errors.append(error(found, exact))
    return max(errors)


def percent(share: float) -> str:
    """Two digits."""
    return f"{100 * share:.0f} %" if share > 0.1 else f"{100 * share:.2g} %"


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = {"autograd over fp32 logits": "plain", "PyTorch": "rows_torch", "Triton": "rows_triton"}
    print(f"| | {' | '.join(d.replace('_kl', ' KL').replace('jsd', 'JSD') for d in DIVERGENCES)} |")
    print("|---|---|---|---|---|", flush=True)
    for title, name in ways.items():
        found = (percent(worst(divergence, name, device)) for divergence in DIVERGENCES)
        print(f"| {title} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
