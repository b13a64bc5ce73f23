"""Token ids as trainers hold them: lists, arrays, padded batches."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opcd.errors import InputError

TokenIds: TypeAlias = Any  # lists of ids, of tensors or of arrays; a (B, T) tensor or array
Mask: TypeAlias = Tensor | Sequence[Any] | None  # (B, T), 1 on real tokens


def token_lists(token_ids: TokenIds, mask: Mask, what: str) -> list[list[int]]:
    """The real tokens of each sequence. `what` names them in errors.

    Raises InputError for something else than whole numbers, a mask of another shape, and a mask
    with a gap inside a sequence.
    """
    rows = [_whole_numbers(row, what) for row in token_ids]
    if mask is None:
        return rows
    marks = [[bool(mark) for mark in torch.as_tensor(row).tolist()] for row in mask]
    if [*map(len, rows)] != [*map(len, marks)]:
        raise InputError(
            f"{what}_mask must have the shape of {what}_ids, got {len(marks)} rows of "
            f"{sorted({*map(len, marks)})} and {len(rows)} of {sorted({*map(len, rows)})}"
        )
    return [_marked(row, own, what) for row, own in zip(rows, marks, strict=True)]


def _whole_numbers(row: Any, what: str) -> list[int]:
    found = torch.as_tensor(row)
    if found.dim() != 1 or (found.numel() and (found.is_floating_point() or found.is_complex())):
        raise InputError(
            f"every {what} must be a row of token ids, got {found.dtype} of shape "
            f"{tuple(found.shape)}; give lists of ids, or a (B, T) tensor and its mask"
        )
    return [int(token) for token in found.tolist()]


def _marked(row: list[int], marks: list[bool], what: str) -> list[int]:
    """The marked tokens, which stand next to each other."""
    if True not in marks:
        return []
    first, end = marks.index(True), len(marks) - marks[::-1].index(True)
    if not all(marks[first:end]):
        raise InputError(
            f"{what}_mask must mark tokens that stand next to each other, got a gap at position "
            f"{first + marks[first:end].index(False)}; score turns with others between them as "
            f"episodes (opcd.episodes.Episode)"
        )
    return row[first:end]
