"""Recorded prefixes within a memory budget, and what tells that a model's weights have changed."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from opcd.errors import InputError
from opcd.passes.prefix import SharedPrefix


class StalePrefixError(InputError):
    """The weights behind a recorded prefix are no longer those of the model."""


class PrefixCache:
    """Prefixes of one model by name; of more than `budget_bytes` the least recently used go first.

    The one that was asked for last stays, whatever its size; it is recorded before others go.
    """

    def __init__(self, model: torch.nn.Module, budget_bytes: int) -> None:
        self._model = model
        self.budget_bytes = budget_bytes
        self._prefixes: OrderedDict[str, SharedPrefix] = OrderedDict()

    def get(self, name: str, token_ids: Sequence[int]) -> SharedPrefix:
        """The prefix, recorded now if it is not held."""
        if name not in self._prefixes:
            self._prefixes[name] = SharedPrefix(self._model, token_ids)
        self._prefixes.move_to_end(name)
        while len(self._prefixes) > 1 and self.nbytes > self.budget_bytes:
            self._prefixes.popitem(last=False)
        return self._prefixes[name]

    def expected_bytes(self, name: str, token_ids: Sequence[int]) -> int:
        """What the prefix takes, by the size of those that are held; 0 where there is none."""
        if name in self._prefixes:
            return self._prefixes[name].nbytes
        tokens = sum(map(len, self._prefixes.values()))
        return self.nbytes * len(token_ids) // tokens if tokens else 0

    def clear(self) -> None:
        """Forget every prefix."""
        self._prefixes.clear()

    @property
    def names(self) -> list[str]:
        """What is held, the least recently used first."""
        return list(self._prefixes)

    @property
    def nbytes(self) -> int:
        """Memory of what is held."""
        return sum(prefix.nbytes for prefix in self._prefixes.values())


def weights_version(model: torch.nn.Module) -> int:
    """A number that changes when weights that the model now uses do, or its adapter's state.

    Weights of an adapter that is off do not count. torch counts changes in place, but not those of
    its fused optimizers, nor through ``parameter.data``: for them one number of each is looked at.
    """
    idle: set[int] = set()
    states: list[Any] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p and id(module) not in idle:
            states.append(module.training)
        if isinstance(module, BaseTunerLayer):
            states.append(adapter_state(module))
            if module.disable_adapters:
                own = [getattr(module, name) for name in module.adapter_layer_names]
                idle.update(id(p) for part in own for p in part.parameters())
    used = [p.detach() for p in model.parameters() if id(p) not in idle and p.numel()]
    states += [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in used]
    samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in used:  # stacked by kind: a launch for many, not one or two for each
        samples.setdefault((p.device, p.dtype), []).append(p[tuple(n // 2 for n in p.shape)])
    numbers = [torch.stack(same).double().view(torch.int64).tolist() for same in samples.values()]
    return hash((*states, *chain.from_iterable(numbers)))


def adapter_state(layer: BaseTunerLayer) -> tuple[Any, ...]:
    """What an adapter adds to its layer, apart from its weights: whether, which, how much."""
    scaling = getattr(layer, "scaling", {})
    scales = tuple(sorted(scaling.items())) if isinstance(scaling, dict) else ()
    active = layer.disable_adapters or (tuple(layer.active_adapters), scales)
    return active, tuple(layer.merged_adapters)
