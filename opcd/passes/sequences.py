"""Token ids as trainers hold them: lists, arrays, padded batches."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from opcd.errors import InputError

TokenIds: TypeAlias = Any  # lists of ids, of tensors or of arrays; a (B, T) tensor or array
Mask: TypeAlias = Tensor | Sequence[Any] | None  # (B, T), 1 on real tokens
Run: TypeAlias = tuple[int, int]  # start and length


def token_lists(token_ids: TokenIds, mask: Mask, what: str) -> list[list[int]]:
    """The real tokens of each sequence. `what` names them in errors.

    Raises InputError for something else than whole numbers, a mask of another shape, and a mask
    with a gap inside a sequence.
    """
    rows = whole_numbers(token_ids, what)
    if mask is None:
        return rows
    found = []
    for row, runs in zip(rows, marked_runs(mask, rows, what, f"{what}_mask"), strict=True):
        if len(runs) > 1:
            raise InputError(
                f"{what}_mask must mark tokens that stand next to each other, got a gap at "
                f"position {sum(runs[0])}; score turns with others between them as episodes "
                f"(opcd.episodes.Episode)"
            )
        found.append([token for start, length in runs for token in row[start : start + length]])
    return found


def marked_runs(mask: Mask, rows: Sequence[Sequence[int]], what: str, name: str) -> list[list[Run]]:
    """The runs of tokens that the mask called `name` marks in each row.

    Raises InputError for a mask of another shape.
    """
    assert mask is not None
    marks = [[bool(mark) for mark in torch.as_tensor(row).tolist()] for row in mask]
    if [*map(len, rows)] != [*map(len, marks)]:
        raise InputError(
            f"{name} must have the shape of {what}_ids, got {len(marks)} rows of "
            f"{sorted({*map(len, marks)})} and {len(rows)} of {sorted({*map(len, rows)})}"
        )
    found = []
    for row in marks:
        framed = [False, *row, False]
        edges = [t for t in range(len(row) + 1) if framed[t] != framed[t + 1]]
        found.append([(a, b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)])
    return found


def whole_numbers(token_ids: TokenIds, what: str) -> list[list[int]]:
    """All tokens of each sequence, pads too. Raises InputError for something else than ids."""
    return [_whole_numbers(row, what) for row in token_ids]


def _whole_numbers(row: Any, what: str) -> list[int]:
    try:
        found = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"every {what} must be a row of token ids, got {type(row).__name__}; encode text with "
            f"the model's tokenizer"
        ) from error
    if found.dim() != 1 or (found.numel() and (found.is_floating_point() or found.is_complex())):
        raise InputError(
            f"every {what} must be a row of token ids, got {found.dtype} of shape "
            f"{tuple(found.shape)}; give lists of ids, or a (B, T) tensor and its mask"
        )
    return [int(token) for token in found.tolist()]
