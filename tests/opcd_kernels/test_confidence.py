"""Gradients of tokens of which a model is sure: their entries are small, and sum to 0."""

import pytest
import torch

from benchmarks.confidence import DIVERGENCES, VOCABULARIES, cells, error, logits, ours, plain
from opcd_kernels import rows_torch
from tests.opcd_kernels.problems import WHERE, Where

# What fp32 logarithms leave of a gradient between models that are 0.01 apart.
NOISE = 2e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("where", WHERE)
def test_the_error_is_at_most_twice_that_of_fp32_logits(
    where: Where, divergence: str, dtype: torch.dtype
) -> None:
    """Rounded to the products' dtype as ours is, over confidence, flatness and vocabulary."""
    interpreted = where.backend == "triton" and where.device == "cpu"
    every = cells(VOCABULARIES[:1] if interpreted else VOCABULARIES)
    if interpreted:
        every = [*every[::3], (32000, 0.9999, 2.0, 0.01)]
    if where.backend == "torch" and dtype == torch.bfloat16:
        return  # rounded by the products
    backend = rows_torch
    if where.backend == "triton":
        backend = pytest.importorskip("opcd_kernels.rows_triton")
    for cell in every:
        z_s, z_t = logits(*cell)
        exact = plain(z_s, z_t, divergence, torch.float64)
        allowed = error(plain(z_s, z_t, divergence, torch.float32).to(dtype), exact)
        found = error(ours(z_s, z_t, divergence, backend, where.device, dtype), exact)
        assert found <= max(2 * allowed, NOISE), (cell, found, allowed)
