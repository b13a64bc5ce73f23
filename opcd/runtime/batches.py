"""Sequences to batches that hold little padding."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


def batches_by_tokens(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches whose rows, padded to the longest, hold at most `max_tokens`.

    Neighbours in length together, longest first; a longer sequence makes a batch alone.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


class Piece(NamedTuple):
    """Tokens `begin` … `end` − 1 of a sequence."""

    sequence: int
    begin: int
    end: int


def pieces_by_tokens(
    lengths: Sequence[int], max_tokens: int, whole: bool = False
) -> Iterator[list[Piece]]:
    """Every token of sequences, in order, in passes of at most `max_tokens`.

    A sequence is cut where a pass is full, and goes on as the first piece of the next one; unless
    they must stay whole, of which none may be longer than a pass.
    """
    here: list[Piece] = []
    room = max_tokens
    for sequence, length in enumerate(lengths):
        if whole and here and length > room:
            yield here
            here, room = [], max_tokens
        begin = 0
        while begin < length:
            end = min(length, begin + room)
            here.append(Piece(sequence, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                yield here
                here, room = [], max_tokens
    if here:
        yield here
