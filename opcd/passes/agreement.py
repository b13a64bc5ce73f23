"""Whether two ways to make a pass agree: their difference beside what rounding alone makes."""

import contextlib
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from opcd.models.head import head_of
from opcd.models.lm import causal_lm
from opcd.objective import head_divergence
from opcd.passes.hidden import Row, scored_hidden

NEGLIGIBLE = 1e-6  # nats a token, whatever the dtype
TIMES_NOISE = 4
NOISE_PASSES = 4  # over the rows, each with other roundings
# Rounding now and then sends a token to another expert: one of so many is left out in 16 bits.
REROUTED = 32
FP32_ROUNDING = {"tf32": 2**-10, "bf16": 2**-7}  # of products, where it is not fp32's own, 2⁻²³


class Agreement:
    """Judges hidden states of some tokens by those of full passes.

    What counts is the mean divergence in nats a token under the model's head. It may be a few times
    what the model itself makes of one rounding of its embeddings: from there on all roundings of a
    pass are others, as they are in another order of the same sums. That is measured once, and only
    where the difference is not negligible.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        full: Tensor,  # (N, D)
        rows: Sequence[Row],  # the same tokens, to be passed with noise
        padded: Tensor,  # (N, D), what they give without
    ) -> None:
        self._model = model
        self._full = full
        self._rows = [*rows]
        self._padded = padded
        self._bound: float | None = None

    def gap(self, hidden: Tensor) -> float:
        """Nats a token."""
        return self._divergence(hidden, self._full).mean().item()

    def wrong(self, hidden: Tensor) -> str | None:
        """How hidden states differ from those of full passes, or None if they agree."""
        gaps = self._divergence(hidden, self._full)
        if gaps.mean().item() <= NEGLIGIBLE:
            return None
        if self._bound is None:
            self._bound = max(NEGLIGIBLE, TIMES_NOISE * self._noise())
        left_out = len(gaps) // REROUTED if rounding(self._model) > 2**-20 else 0
        counted = gaps.sort().values[: len(gaps) - left_out].sum().item() / len(gaps)
        if counted <= self._bound:
            return None
        return (
            f"two short sequences differ from full passes by {gaps.mean().item():.2g} nats a "
            f"token, more than the {self._bound:.2g} that rounding explains"
        )

    def _noise(self) -> float:
        """Nats a token; one pass after the other, as large as those that are judged."""
        with rounded_embeddings(self._model):
            gaps = [
                self._divergence(scored_hidden(self._model, self._rows), self._padded).mean().item()
                for _ in range(NOISE_PASSES)
            ]
        return fmean(gaps)

    def _divergence(self, hidden: Tensor, expected: Tensor) -> Tensor:
        head = head_of(self._model)
        return head_divergence(hidden, head, expected, head).per_token


def rounding(model: torch.nn.Module) -> float:
    """The relative distance of numbers that a pass of the model tells apart."""
    lm = causal_lm(model)
    kind, dtype = lm.device.type, lm.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float32:
        library = torch.backends.cuda if kind == "cuda" else torch.backends.mkldnn
        return FP32_ROUNDING.get(library.matmul.fp32_precision, 2**-23)
    return torch.finfo(dtype).eps


@contextlib.contextmanager
def rounded_embeddings(model: torch.nn.Module) -> Iterator[None]:
    """Every embedded number a rounding larger or smaller."""
    step = rounding(model)
    generator = torch.Generator().manual_seed(0)

    def rounded(_module: Any, _args: Any, embedded: Tensor) -> Tensor:
        signs = torch.randint(0, 2, embedded.shape, generator=generator) * 2 - 1
        factors = 1 + step * signs.to(embedded.device, torch.float32)
        return (embedded * factors).to(embedded.dtype)

    hook = causal_lm(model).get_input_embeddings().register_forward_hook(rounded)
    try:
        yield
    finally:
        hook.remove()
