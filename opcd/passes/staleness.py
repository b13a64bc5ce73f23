"""Whether a model still computes with the weights that a prefix was recorded with."""

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opcd.errors import InputError

SUMMED = 2**22  # numbers at once
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class StalePrefixError(InputError):
    """The weights behind a recorded prefix are no longer those of the model."""


class WeightsWatch:
    """Tells whether the weights that a model uses, and its adapter's state, are those of before.

    Weights of an adapter that is off, or of one that is not active, do not count. Most calls
    compare where the weights lie, torch's count of changes in place, and one number of each, for
    writes that are not counted (fused optimizers, ``parameter.data``). Where that differs, as after
    a pass that put weights aside and back, every value is compared.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.take()

    def take(self) -> None:
        """Take the weights as they now are."""
        self._state = _state(self._model)
        self._marks = _marks(self._model)
        self._sums = _sums(self._model)

    def changed(self) -> bool:
        """Whether they are others now."""
        if _state(self._model) != self._state:
            return True
        marks = _marks(self._model)
        if marks == self._marks:
            return False
        if _sums(self._model) != self._sums:
            return True
        self._marks = marks
        return False


def adapter_state(layer: BaseTunerLayer) -> tuple[Any, ...]:
    """What an adapter adds to its layer, apart from its weights: whether, which, how much."""
    scaling = getattr(layer, "scaling", {})
    scales = tuple(sorted(scaling.items())) if isinstance(scaling, dict) else ()
    active = layer.disable_adapters or (tuple(layer.active_adapters), scales)
    return active, tuple(layer.merged_adapters)


def used_weights(model: torch.nn.Module) -> Iterator[Tensor]:
    """The parameters that a pass of the model reads."""
    idle: set[int] = set()
    for module in model.modules():
        idle.update(id(p) for part in _idle_parts(module) for p in part)
    used = (p for p in model.parameters() if id(p) not in idle)
    return (part.detach() for p in used for part in _parts(p))


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """The tensors of numbers that a weight is made of: several where it is quantised."""
    if is_traceable_wrapper_subclass(weight):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))
    elif weight.numel():
        yield weight


def _idle_parts(module: torch.nn.Module) -> Iterator[Iterator[Tensor]]:
    """Parameters of a peft wrapper that it does not use as it is."""
    if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return
    active = [] if module.disable_adapters else list(module.active_adapters)
    if isinstance(module, AuxiliaryTrainingWrapper) and active:
        yield module.original_module.parameters()
    for name in module.adapter_layer_names:
        for adapter, part in getattr(module, name, {}).items():
            if adapter not in active:
                yield part.parameters() if isinstance(part, torch.nn.Module) else iter([part])


def _state(model: torch.nn.Module) -> list[Any]:
    """What changes a pass beside its weights: the state of adapters."""
    states: list[Any] = []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            states.append(adapter_state(module))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            states.append((module.disable_adapters, tuple(module.active_adapters)))
    return states


def _marks(model: torch.nn.Module) -> list[Any]:
    """Where the weights lie, how often they were changed, and one number of each."""
    used = list(used_weights(model))
    marks: list[Any] = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in used]
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in used:  # stacked by kind: a launch for many, not one or two for each
        samples.setdefault((p.device, p.dtype), []).append(p[tuple(n // 2 for n in p.shape)])
    numbers = [
        torch.stack(same).cpu().double().view(torch.int64).tolist() for same in samples.values()
    ]
    return marks + numbers


def _sums(model: torch.nn.Module) -> list[int]:
    """Of each weight the sum of its bits, read as whole numbers."""
    used = (p for p in used_weights(model) if p.element_size() in BITS)
    return [_sum(p.view(BITS[p.element_size()])) for p in used]


def _sum(bits: Tensor) -> int:
    """On a CPU a part at a time: the sum makes 64-bit numbers of all that it is given."""
    if bits.device.type != "cpu" or bits.dim() == 0:
        return int(bits.sum(dtype=torch.int64).item())
    rows = max(1, SUMMED // bits[:1].numel())
    return sum(int(part.sum(dtype=torch.int64).item()) for part in bits.split(rows))
