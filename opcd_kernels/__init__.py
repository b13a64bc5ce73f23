"""Exact divergence between two language-model heads, without their logits.

linear_divergence  the public function: checks, and what goes to whom
arguments          what must fit together, and what to do where it does not
options            what is computed, as one value
autograd           the operator that autograd and torch.compile see, and its backward
weight_grad        the head's gradient added to .grad at once: when that is right
chunks             START HERE: products, divergence, products, a chunk of tokens at a time
sizes              how many tokens at a time, by the bytes that are there
backends           who computes; which of the two Triton designs, by measurement
trial              whether that agrees with PyTorch on the device, once
tuned              what was measured on this device, in the user's cache
tune               measures it: python -m opcd_kernels.tune
products           matrix products with fp32 sums, on a GPU and elsewhere
rows               what is asked of rows of logits, and what is found
tokens             the tokens that count: weights, shares and targets without the others
rows_triton        rows of logits to divergence and gradient: one Triton kernel
rows_torch         the same in PyTorch
dual_triton        no logits: both models in one product, then the gradient
terms_triton       what one vocabulary entry adds, for both Triton designs
prefix_attention   attention of packed sequences behind prefixes: a Triton kernel
reference          the definitions, the oracle of every test
"""

from opcd_kernels.linear_divergence import LinearDivergence, linear_divergence

__all__ = ["LinearDivergence", "linear_divergence"]
__version__ = "0.1.0"
