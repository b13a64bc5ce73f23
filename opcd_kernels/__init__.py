"""Exact divergence between two language-model heads, without their logits."""

from opcd_kernels.linear_divergence import LinearDivergence, linear_divergence

__all__ = ["LinearDivergence", "linear_divergence"]
__version__ = "0.1.0"
