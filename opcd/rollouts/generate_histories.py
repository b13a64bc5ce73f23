"""Histories in a cache of transformers: what several prompts begin with is computed once."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from opcd.models.lm import cache_argument, cache_of, causal_lm, rope_differs, transformer
from opcd.models.sdpa import without_cudnn_attention
from opcd.passes.prefix import MIN_TOKENS_SAVED, SharedPrefix
from opcd.rollouts.histories import Branch, branches, tokens_saved


def shared_branches(
    model: torch.nn.Module, prompts: Sequence[Sequence[int]], shared: int
) -> list[Branch]:
    """What prompts share behind their first `shared` tokens, of all but the last token of each.

    Each is for itself where a history alone would be given other rotary frequencies.
    """
    sequences = [prompt[:-1] for prompt in prompts]
    if rope_differs(causal_lm(model).config, 1, max(map(len, prompts))):
        return [Branch(i, len(sequence)) for i, sequence in enumerate(sequences)]
    return branches(sequences, shared)


def worth_a_pass(found: Sequence[Branch], shared: int) -> bool:
    """Whether a pass over histories saves as much as it costs."""
    return tokens_saved(found, shared) >= MIN_TOKENS_SAVED


@torch.no_grad()
def with_histories(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    found: Sequence[Branch],
    prefix: SharedPrefix | None,
    pad: int,
) -> tuple[Cache, int]:
    """A cache with a row for each prompt, which holds its history, and how many columns it has.

    Trunks are padded on the right: under causal attention no real position sees a pad.
    """
    start = len(prefix) if prefix is not None else 0
    trunks = [i for i, branch in enumerate(found) if branch.trunk == i]
    columns = max(found[i].length for i in trunks)
    ids = torch.full((len(trunks), columns - start), pad)
    for row, i in zip(ids, trunks, strict=True):
        own = prompts[i][start : found[i].length]
        row[: len(own)] = torch.tensor(own)
    device = causal_lm(model).device
    positions = torch.arange(start, columns, device=device)
    body: Any = transformer(model)
    held = prefix.expand(len(trunks)) if prefix is not None else None
    with without_cudnn_attention():
        output = body(
            input_ids=ids.to(device),
            position_ids=positions.expand(len(trunks), -1),
            use_cache=True,
            **cache_argument(body, held),
        )
    cache = cache_of(output)
    place = {i: row for row, i in enumerate(trunks)}
    rows = torch.tensor([place[branch.trunk] for branch in found], device=device)
    cache.batch_select_indices(rows)
    return cache, columns
