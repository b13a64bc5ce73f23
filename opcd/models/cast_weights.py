"""fp32 weights in the dtype of the passes, cast once a step instead of in every pass."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import functional_call

from opcd.models.lm import causal_lm

T = TypeVar("T")


class CastWeights:
    """The linear layers' weights of a model as autocast would cast them, in memory of their own.

    `run` puts them in the weights' places: results are autocast's, and gradients reach the fp32
    weights as through its casts. Call `outdated` when weights have changed; the casts are made
    anew, into the same memory, when they are next needed.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        lm = causal_lm(model)
        head = lm.get_output_embeddings()
        self._scope = _Scope(lm)
        self._weights: dict[str, Tensor] = {}
        self._casts: dict[str, Tensor] = {}
        self._of_head: set[str] = set()
        for name, module in self._scope.named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            for kind, parameter in module.named_parameters("", recurse=False):
                if parameter.dtype == torch.float32:
                    full = f"{name}.{kind}"
                    self._weights[full] = parameter
                    self._casts[full] = torch.empty_like(parameter, dtype=dtype)
                    if module is head:
                        self._of_head.add(full)
        self._outdated = True

    @property
    def nbytes(self) -> int:
        """Memory of the casts."""
        return sum(cast.nbytes for cast in self._casts.values())

    def outdated(self) -> None:
        """The weights have changed."""
        self._outdated = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the weights as they are now, if they have changed."""
        if self._outdated:
            for name, weight in self._weights.items():
                self._casts[name].copy_(weight)
            self._outdated = False

    def run(self, function: Callable[[], T], head: bool = False) -> T:
        """`function()`, with the casts in the places of the weights; the head's own if asked for.

        With gradients the head is left as it is: the loss takes it in fp32.
        """
        self.refresh()
        used = {n: c for n, c in self._casts.items() if head or n not in self._of_head}
        if torch.is_grad_enabled():
            used = {n: _InPlaceOf.apply(self._weights[n], c) for n, c in used.items()}
        # A tied embedding is not cast where the head is.
        found: T = functional_call(self._scope, used, (function,), tie_weights=False)
        return found


class _Scope(torch.nn.Module):
    """Whatever is called inside of its forward sees the weights that `functional_call` sets."""

    def __init__(self, lm: torch.nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class _InPlaceOf(torch.autograd.Function):
    """The cast, as if it had just been made of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return cast.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
