"""What the method needs of a causal language model: its hidden states, its head, its limits."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from opcd.errors import InputError
from opcd_kernels import reference

if TYPE_CHECKING:
    from opcd.prefix import SharedPrefix


class Head(NamedTuple):
    """The map from hidden states to logits: ``softcap(scale · hidden @ weight.T + bias)``."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    scale: float


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(model: torch.nn.Module) -> Head:
    """The output head of a causal LM."""
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    output = lm.get_output_embeddings()
    assert output is not None, f"{type(lm).__name__} has no lm_head"
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(
        output.weight,
        getattr(output, "bias", None),
        getattr(config, "final_logit_softcapping", None),
        scale,
    )


@torch.no_grad()
def check_head(model: torch.nn.Module, token_ids: Sequence[int]) -> None:
    """Raise InputError if `head_of` does not reproduce the model's own logits on `token_ids`."""
    lm = causal_lm(model)
    ids = torch.tensor([list(token_ids)], device=lm.device)
    head = head_of(model)
    expected = lm(input_ids=ids, use_cache=False).logits[0].float()
    hidden = lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    hidden = hidden.to(head.weight.dtype)
    ours = reference.logits(hidden * head.scale, head.weight, head.bias, head.softcap).float()
    error, size = (ours - expected).abs().max().item(), expected.abs().max().item()
    if not error <= 0.02 * max(size, 1.0):
        raise InputError(
            f"the logits of {type(lm).__name__} must be softcap(scale · lm_head(hidden)), but they "
            f"differ from that by {error:.3g} (largest logit {size:.3g}); this architecture is not "
            f"supported"
        )


def max_positions(config: PretrainedConfig) -> int | None:
    """Number of positions the model was made for, or None where its configuration names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def eos_token_ids(model: torch.nn.Module) -> list[int]:
    """The tokens that end a completion, from the generation config, then the model's own."""
    lm = causal_lm(model)
    for config in (lm.generation_config, lm.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return list(ids) if isinstance(ids, (list, tuple)) else [ids]
    raise InputError(
        f"the model {lm.name_or_path!r} must name its end-of-sequence token, got none in its "
        f"generation_config.json and config.json; add eos_token_id"
    )


def completion_hidden(
    model: torch.nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    prefix: "SharedPrefix | None" = None,
) -> Tensor:  # (N, D), N = sum of completion lengths
    """The hidden states that predict each completion token, packed in the order given.

    One padded pass. Rows are padded on the right, so under causal attention no real position sees
    a pad and no mask is needed. The last completion token predicts nothing and is left out.
    """
    lm = causal_lm(model)
    sequences = [[*p, *c][:-1] for p, c in zip(prompt_ids, completion_ids, strict=True)]
    input_ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)  # (B, T)
    for row, sequence in zip(input_ids, sequences, strict=True):
        row[: len(sequence)] = torch.tensor(sequence)
    rows, columns = [], []
    for b, (p, c) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        rows += [b] * len(c)
        columns += range(len(p) - 1, len(p) - 1 + len(c))

    start = len(prefix) if prefix is not None else 0
    positions = torch.arange(start, start + input_ids.shape[1], device=lm.device)
    cache = prefix.expand(len(sequences)) if prefix is not None else None
    output = lm.base_model(
        input_ids=input_ids.to(lm.device),
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state[
        torch.tensor(rows, device=lm.device), torch.tensor(columns, device=lm.device)
    ]


def batches_by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`, neighbours in length together, longest first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]
