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
        self._sizes: dict[str, int] = {}  # bytes, by name
        self.nbytes = 0  # memory of what is held
        self._tokens = 0

    def get(self, name: str, token_ids: Sequence[int]) -> SharedPrefix:
        """The prefix, recorded now if it is not held."""
        if name not in self._prefixes:
            self._add(name, SharedPrefix(self._model, token_ids))
        self._prefixes.move_to_end(name)
        while len(self._prefixes) > 1 and self.nbytes > self.budget_bytes:
            self._drop(next(iter(self._prefixes)))
        return self._prefixes[name]

    def expected_bytes(self, name: str, token_ids: Sequence[int]) -> int:
        """What the prefix takes, by the size of those that are held; 0 where there is none."""
        if name in self._sizes:
            return self._sizes[name]
        return self.nbytes * len(token_ids) // self._tokens if self._tokens else 0

    def clear(self) -> None:
        """Forget every prefix."""
        for name in [*self._prefixes]:
            self._drop(name)

    @property
    def names(self) -> list[str]:
        """What is held, the least recently used first."""
        return list(self._prefixes)

    def _add(self, name: str, prefix: SharedPrefix) -> None:
        self._prefixes[name] = prefix
        self._sizes[name] = prefix.nbytes
        self.nbytes += self._sizes[name]
        self._tokens += len(prefix)

    def _drop(self, name: str) -> None:
        self._tokens -= len(self._prefixes.pop(name))
        self.nbytes -= self._sizes.pop(name)
