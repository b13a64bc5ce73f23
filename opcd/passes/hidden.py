"""The hidden states that predict scored tokens: one pass over many sequences."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.models.head import head_of
from opcd.models.lm import cache_argument, causal_lm, transformer
from opcd.models.sdpa import without_cudnn_attention
from opcd.passes.packed import Behind, InRow, packed_pass
from opcd.passes.packing import Packing
from opcd.passes.prefix import SharedPrefix, empty_cache
from opcd.runtime.upload import uploaded


class Row(NamedTuple):
    """One sequence of a pass."""

    token_ids: Sequence[int]  # without the prefix
    spans: Sequence[tuple[int, int]]  # start and length of what is scored, in order
    prefix: SharedPrefix | None = None  # what it stands behind

    def behind(self, prefix: SharedPrefix | None) -> "Row":
        """The same, what it starts with left to a prefix."""
        n = len(prefix) if prefix is not None else 0
        spans = [(start - n, length) for start, length in self.spans]
        return Row(self.token_ids[n:], spans, prefix)

    @property
    def needed(self) -> Sequence[int]:
        """What a model must be given: the last scored token predicts nothing."""
        start, length = self.spans[-1]
        return self.token_ids[: start + length - 1]

    @property
    def predicting(self) -> list[int]:
        """The positions that predict the scored tokens: each the one in front of it."""
        return [t - 1 for start, length in self.spans for t in range(start, start + length)]


def completion_rows(
    prompt_ids: Sequence[Sequence[int]],  # without the prefix
    completion_ids: Sequence[Sequence[int]],
    prefix: SharedPrefix | None = None,
) -> list[Row]:
    """Completions behind prompts, all of them scored."""
    return [
        Row([*prompt, *done], [(len(prompt), len(done))], prefix)
        for prompt, done in zip(prompt_ids, completion_ids, strict=True)
    ]


def scored_hidden(
    model: torch.nn.Module,
    rows: Sequence[Row],
    packed: bool = False,
    shared: int = 0,
    takes_cache: bool = False,
) -> Tensor:  # (N, D), N = all scored tokens
    """The hidden states that predict each scored token, in the order given.

    They are ready for the head's weight: a scale that the model puts on its logits is applied.
    `packed` is for models on which `find_plan` found that exact, and its rows may stand behind
    different prefixes; the others take padded rows, all behind one prefix. The first `shared`
    tokens of packed rows without a prefix are the same in all, and are computed once, in the row.
    `takes_cache`: the model was found to take a cache of keys and values; padded rows without a
    prefix are then given an empty one, and nobody waits for the device (see `empty_cache`).

    Raises UnsupportedModelError if `packed` and the model does not go through `AttentionInterface`.
    """
    assert not shared or packed, "padded rows share what was recorded"
    hidden = _packed_rows(model, rows, shared) if packed else _padded_rows(model, rows, takes_cache)
    scale = head_of(model).scale
    return hidden if scale == 1 else hidden * scale


def _packed_rows(model: torch.nn.Module, rows: Sequence[Row], shared: int) -> Tensor:
    device = causal_lm(model).device
    groups: dict[int, list[int]] = {}  # rows by their prefix, the longest of each first
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].needed)):
        groups.setdefault(id(rows[i].prefix), []).append(i)
    order = [i for group in groups.values() for i in group]
    lengths = [[len(rows[i].needed) - shared for i in group] for group in groups.values()]
    sequences = [rows[i].needed[shared:] for i in order]
    prefixes: list[Behind] = [rows[group[0]].prefix for group in groups.values()]
    first = 0  # of the rows' sequences among those of the packed row
    if shared:
        assert prefixes == [None], "either a prefix or a start of their own"
        lengths, prefixes = [[shared], *lengths], [None, InRow(0, shared)]
        sequences, first = [rows[0].needed[:shared], *sequences], 1
    packing = Packing(lengths, device)
    ids = torch.tensor([[token for sequence in sequences for token in sequence]])
    starts = dict(zip(order, packing.starts[first:], strict=False))
    wanted = [starts[i] + t - shared for i, row in enumerate(rows) for t in row.predicting]
    index = uploaded(torch.tensor(wanted), device)
    hidden, _ = packed_pass(model, uploaded(ids, device), packing, prefixes)
    return hidden[0].index_select(0, index)


def computes_again(model: torch.nn.Module) -> bool:
    """Whether the backward runs the model's layers once more (gradient checkpointing)."""
    return any(getattr(m, "gradient_checkpointing", 0) and m.training for m in model.modules())


def _padded_rows(model: torch.nn.Module, rows: Sequence[Row], takes_cache: bool) -> Tensor:
    """Rows are padded on the right: under causal attention no real position sees a pad, so that
    no mask is needed."""
    lm, prefix = causal_lm(model), rows[0].prefix
    assert all(row.prefix is prefix for row in rows), "padded rows stand behind one prefix"
    width = max(len(row.needed) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)  # (B, T)
    for line, row in zip(input_ids, rows, strict=True):
        line[: len(row.needed)] = torch.tensor(row.needed)
    wanted = [b * width + t for b, row in enumerate(rows) for t in row.predicting]
    index = uploaded(torch.tensor(wanted), lm.device)
    start = len(prefix) if prefix is not None else 0
    positions = torch.arange(start, start + width, device=lm.device)
    cache = prefix.expand(len(rows), passes=1) if prefix is not None else None
    if takes_cache and cache is None:
        cache = empty_cache(model)
    # Layers that the backward runs again take the attention of the forward only where both are
    # inside, which is the training loop's to see to.
    again = computes_again(model)
    body = transformer(model)
    with contextlib.nullcontext() if again else without_cudnn_attention():
        output = body(
            input_ids=uploaded(input_ids, lm.device),
            position_ids=positions.expand(len(rows), -1),
            use_cache=cache is not None,
            **cache_argument(body, cache),
        )
    return output.last_hidden_state.flatten(0, 1).index_select(0, index)
