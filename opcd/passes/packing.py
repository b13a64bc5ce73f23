"""Where sequences lie in one packed row, and as rectangles for kernels that take those."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.runtime.upload import uploaded


class Block(NamedTuple):
    """Sequences of like length, as the rows of one rectangle."""

    rows: int
    width: int  # the longest
    tokens: slice | Tensor  # of the packed row, in the block's order
    take: Tensor | None  # (rows · width,): which of them each place shows
    real: Tensor | None  # the places that are no pads, in the same order; None for both: no pads

    def spread(self, x: Tensor, pad: float | None = None) -> Tensor:
        """(N, H, D) packed → (rows, H, width, D); pads repeat a token, or hold `pad`."""
        x = x[self.tokens]
        if self.take is not None and self.real is not None:
            if pad is None:
                x = x[self.take]
            else:
                empty = x.new_full((self.rows * self.width, *x.shape[1:]), pad)
                x = empty.index_copy(0, self.real, x)
        return x.unflatten(0, (self.rows, self.width)).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(rows, H, width, D) → (n, H, D) without the pads, in the block's order."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.real is None else x[self.real]


class Packing:
    """Where sequences lie in one packed row of N tokens; each group is behind a prefix of its own.

    Everything is worked out on the host and uploaded, so that no pass waits for the one before.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]],  # lengths, the longest of a group first
        device: torch.device,
    ) -> None:
        assert all(map(all, groups)), "an empty sequence"
        assert all(list(g) == sorted(g, reverse=True) for g in groups), "longest first"
        self._lengths = [*chain.from_iterable(groups)]  # B
        self._group_of = [i for i, group in enumerate(groups) for _ in group]  # B
        self._device = device
        self.longest = max(self._lengths)
        self.starts = [0, *accumulate(self._lengths)]  # B + 1
        ends = [0, *accumulate(map(sum, groups))]
        self.groups = [slice(*bounds) for bounds in pairwise(ends)]  # the tokens of each group
        self.cu_seqlens = uploaded(torch.tensor(self.starts).int(), device)  # (B + 1,) int32
        # (N,): how many tokens of its own sequence stand in front of each token
        self.offsets = uploaded(torch.cat([torch.arange(n) for n in self._lengths]), device)
        self._uploads: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def bounds(self, lengths: Sequence[int]) -> Tensor:
        """(G + 1,) int32: where parts of these lengths begin and end, uploaded once a pass."""
        return self._uploaded("bounds", lengths, lambda: torch.tensor([0, *accumulate(lengths)]))

    def prefix_bounds(self, lengths: Sequence[int]) -> Tensor:
        """(B, 2) int32: first and last + 1 of each sequence's prefix among prefixes in one row."""
        ends = [*accumulate(lengths)]
        rows = [(ends[g] - lengths[g], ends[g]) for g in self._group_of]
        return self._uploaded("prefix_bounds", lengths, lambda: torch.tensor(rows))

    def positions(self, first: Sequence[int]) -> Tensor:
        """(N,): each token's position, where the sequences of a group start at `first`."""
        if len(set(first)) == 1:
            return self.offsets + first[0]
        counts = torch.tensor([x.stop - x.start for x in self.groups])
        shifts = torch.tensor(list(first)).repeat_interleave(counts)
        return self.offsets + uploaded(shifts, self._device)

    def _uploaded(self, kind: str, lengths: Sequence[int], make: Callable[[], Tensor]) -> Tensor:
        key = (kind, tuple(lengths))
        if key not in self._uploads:
            self._uploads[key] = uploaded(make().int(), self._device)
        return self._uploads[key]

    @cached_property
    def blocks(self) -> list[Block]:
        """For kernels that take rectangles; those that take `cu_seqlens` never ask for them."""
        lengths, blocks = self._lengths, []
        first = 0
        for i in range(1, len(self._order) + 1):
            # At most half of a rectangle is padding, and there are few rectangles.
            full = i == len(self._order)
            if full or 2 * lengths[self._order[i]] < lengths[self._order[first]]:
                blocks.append(self._block(self._order[first:i]))
                first = i
        return blocks

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """What `Block.gather` gave for each of the blocks, as one packed row."""
        row = parts[0] if len(parts) == 1 else torch.cat([*parts])
        return row if self._back is None else row[self._back]

    @cached_property
    def _order(self) -> list[int]:
        """The sequences of all groups, the longest first."""
        return sorted(range(len(self._lengths)), key=lambda i: -self._lengths[i])

    @cached_property
    def _back(self) -> Tensor | None:
        """(N,): from the order of the blocks to that of the row; None if it is the same."""
        if self._order == list(range(len(self._order))):
            return None
        return uploaded(self._tokens(self._order).argsort(), self._device)

    def _tokens(self, sequences: Sequence[int]) -> Tensor:
        return torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in sequences])

    def _block(self, sequences: Sequence[int]) -> Block:
        lengths = [self._lengths[i] for i in sequences]
        rows, width = len(lengths), lengths[0]
        tokens: slice | Tensor = slice(self.starts[sequences[0]], self.starts[sequences[-1] + 1])
        if list(sequences) != list(range(sequences[0], sequences[0] + rows)):
            tokens = uploaded(self._tokens(sequences), self._device)
        if lengths[-1] == width:
            return Block(rows, width, tokens, None, None)
        n, column = torch.tensor(lengths), torch.arange(width)
        first = n.cumsum(0) - n
        take = first[:, None] + torch.minimum(column, n[:, None] - 1)  # (rows, width)
        real = (column < n[:, None]).flatten().nonzero()[:, 0]
        take, real = uploaded(take.flatten(), self._device), uploaded(real, self._device)
        return Block(rows, width, tokens, take, real)
