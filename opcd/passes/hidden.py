"""The hidden states that predict completion tokens: one pass over many sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opcd.models.lm import causal_lm, head_of, transformer
from opcd.passes.attention import Packing
from opcd.passes.packed import packed_pass
from opcd.passes.prefix import SharedPrefix
from opcd.runtime.upload import uploaded


def completion_hidden(
    model: torch.nn.Module,
    prompt_ids: Sequence[Sequence[int]],  # without the prefix
    completion_ids: Sequence[Sequence[int]],
    prefix: SharedPrefix | None = None,
    packed: bool = False,
) -> Tensor:  # (N, D), N = sum of completion lengths
    """The hidden states that predict each completion token, packed in the order given.

    They are ready for the head's weight: a scale that the model puts on its logits is applied. The
    last completion token predicts nothing and is left out. `packed` is for models on which
    `find_plan` found that exact; the others take padded rows.

    Raises UnsupportedModelError if `packed` and the model does not go through `AttentionInterface`.
    """
    sequences = [[*p, *c][:-1] for p, c in zip(prompt_ids, completion_ids, strict=True)]
    first = [len(p) - 1 for p in prompt_ids]  # the prompt's last token predicts the first one
    spans = [(s, s + len(c)) for s, c in zip(first, completion_ids, strict=True)]
    run = _packed_rows if packed else _padded_rows
    hidden = run(model, sequences, spans, prefix)
    scale = head_of(model).scale
    return hidden if scale == 1 else hidden * scale


def _packed_rows(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    prefix: SharedPrefix | None,
) -> Tensor:
    device = causal_lm(model).device
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    packing = Packing([len(sequences[i]) for i in order], device)
    ids = torch.tensor([[token for i in order for token in sequences[i]]])
    starts = dict(zip(order, packing.starts, strict=False))
    rows = [starts[i] + t for i, span in enumerate(spans) for t in range(*span)]
    wanted = uploaded(torch.tensor(rows), device)
    hidden, _ = packed_pass(model, uploaded(ids, device), packing, prefix)
    return hidden[0].index_select(0, wanted)


def _padded_rows(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    prefix: SharedPrefix | None,
) -> Tensor:
    """Rows are padded on the right: under causal attention no real position sees a pad, so that
    no mask is needed."""
    lm = causal_lm(model)
    input_ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)  # (B, T)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    width = input_ids.shape[1]
    rows = [b * width + t for b, span in enumerate(spans) for t in range(*span)]
    wanted = uploaded(torch.tensor(rows), lm.device)
    start = len(prefix) if prefix is not None else 0
    positions = torch.arange(start, start + width, device=lm.device)
    cache = prefix.expand(len(sequences), passes=1) if prefix is not None else None
    output = transformer(model)(
        input_ids=uploaded(input_ids, lm.device),
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state.flatten(0, 1).index_select(0, wanted)
