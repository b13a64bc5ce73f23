"""Recorded prefixes within a memory budget."""

from collections import OrderedDict
from collections.abc import Sequence

import torch

from opcd.passes.prefix import SharedPrefix


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
