"""What the method needs of a causal language model: its body, its modes, its limits."""

import contextlib
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from opcd.errors import InputError


def causal_lm(model: Any) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_causal_lm(model: Any) -> None:
    """Raise InputError for what is no causal LM of transformers, in a peft wrapper or not."""
    if isinstance(getattr(model, "module", None), torch.nn.Module):
        raise InputError(
            f"the model must be given without a wrapper, got {type(model).__name__}; hand over "
            f"its .module, and wrap a StudentLoss of it (docs/integrate.md)"
        )
    plain = getattr(model, "_orig_mod", model)  # what torch.compile made of it
    lm = causal_lm(plain) if isinstance(plain, torch.nn.Module) else plain
    if not isinstance(lm, PreTrainedModel):
        raise InputError(
            f"the model must be a causal LM of transformers, or a peft wrapper of one, got "
            f"{type(lm).__name__}; load it with AutoModelForCausalLM"
        )


def transformer(model: torch.nn.Module) -> Any:
    """The model below its head, whose output is the hidden states."""
    lm = causal_lm(model)
    body = lm.get_decoder() if lm.base_model is lm else lm.base_model
    if body is lm:
        body = getattr(lm, "model", lm)
    if body is lm:
        raise InputError(
            f"{type(lm).__name__} must have a body below its head (get_decoder), got none; this "
            f"architecture is not supported"
        )
    return body


def vocabulary_rows(model: torch.nn.Module) -> int:
    """Tokens that the model has an embedding for."""
    return int(causal_lm(model).get_input_embeddings().weight.shape[0])


def last_logits(model: torch.nn.Module) -> dict[str, int]:
    """Arguments of a pass for its last logits alone; {} where a model cannot but give them all."""
    takes = signature(causal_lm(model).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


def cache_argument(module: Any, cache: Any) -> dict[str, Any]:
    """A cache as an argument of a pass, by the name that the module has for it.

    transformers calls it `cache` from 5.24 on, and takes the old name until 5.40.
    """
    name = "cache" if "cache" in signature(module.forward).parameters else "past_key_values"
    return {name: cache}


def cache_of(output: Any) -> Any:
    """The cache that came with a pass, by either name; None without one."""
    name = "cache" if hasattr(output, "cache") else "past_key_values"
    return getattr(output, name, None)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and then in its own again.

    Dropout of any kind, jitter, layerdrop and checkpointing read that mode.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def max_positions(config: PretrainedConfig) -> int | None:
    """Number of positions the model was made for, or None where its configuration names none.

    YaRN stretches what the model was trained on by its factor, and many configurations give the
    length before that. Linear scaling, Llama 3's and longrope count: their configurations give the
    stretched length. Dynamic scaling ends where it begins to stretch: beyond that transformers
    takes the frequencies from the longest sequence that a pass, or one before it, has seen.
    """
    text = config.get_text_config()
    named: int | None = getattr(text, "max_position_embeddings", None)
    stretched = [
        int((rope.get("original_max_position_embeddings") or named or 0) * rope.get("factor", 1))
        for rope in _ropes(config)
        if rope.get("rope_type") == "yarn"
    ]
    fixed = [
        int(rope.get("original_max_position_embeddings") or named or 0)
        for rope in _ropes(config)
        if rope.get("rope_type") == "dynamic"
    ]
    if named is None or named < 1:
        return None
    return min([max([named, *stretched]), *fixed])


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The settings of the rotary embeddings; several where kinds of layers have their own."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    several = bool(rope) and all(isinstance(value, dict) for value in rope.values())
    return [*rope.values()] if several else [rope]


def _changing_rope(config: PretrainedConfig) -> tuple[str | None, int]:
    """Kind of the rotary embeddings and the length behind which their frequencies are others.

    transformers takes them from the longest row of a pass, so that a sequence's hidden states
    depend on its neighbours. The kind is None where frequencies are fixed.
    """
    text = config.get_text_config()
    for rope in _ropes(config):
        limit = (
            rope.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
            or getattr(text, "max_position_embeddings", None)
            or 0
        )
        if rope.get("rope_type") in ("dynamic", "longrope") and limit:
            return rope["rope_type"], limit
    return None, 0


def rope_differs(config: PretrainedConfig, prefix_length: int, longest: int) -> bool:
    """Whether a prefix gets other rotary frequencies alone than in sequences up to `longest`."""
    kind, limit = _changing_rope(config)
    return kind is not None and longest > limit and (kind == "dynamic" or prefix_length <= limit)


def rope_side(config: PretrainedConfig, length: int) -> bool:
    """Whether a sequence is longer than where rotary frequencies change: those that are not must
    share no pass with it."""
    kind, limit = _changing_rope(config)
    return kind is not None and length > limit


def check_rope(config: PretrainedConfig, shortest: int, longest: int) -> None:
    """Raise InputError if sequence lengths lie on both sides of where rotary frequencies change."""
    kind, limit = _changing_rope(config)
    if kind is not None and shortest <= limit < longest:
        raise InputError(
            f"with rotary embeddings of type {kind} all sequences must lie on one side of "
            f"{limit} tokens, got {shortest} to {longest} with their completions; shorten the "
            f"context or max_completion_tokens, or lengthen the context"
        )


def eos_token_ids(model: torch.nn.Module) -> list[int]:
    """The tokens that end a completion, from the generation config, then the model's own."""
    lm = causal_lm(model)
    found = _eos_token_ids(lm)
    check_ends(found, lm.name_or_path)
    return found


def _eos_token_ids(lm: PreTrainedModel) -> list[int]:
    return eos_token_ids_in((lm.generation_config, lm.config.get_text_config()))


def eos_token_ids_in(configs: Sequence[Any]) -> list[int]:
    """Those of the first configuration that names some; [] where none does."""
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return list(ids) if isinstance(ids, (list, tuple)) else [ids]
    return []


def check_ends(eos_ids: Sequence[int], name: str) -> None:
    """Raise InputError if nothing ends a completion of the model called `name`."""
    if eos_ids:
        return
    raise InputError(
        f"the model {name!r} must name its end-of-sequence token, got none in its "
        f"generation_config.json and config.json; add eos_token_id"
    )


def stop_at(model: torch.nn.Module, token_ids: Sequence[int]) -> None:
    """Let the tokens end a completion too: what the chat template writes behind an answer.

    Kept in the generation config, so that a saved model stops there as well.
    """
    known = _eos_token_ids(causal_lm(model))
    if added := [token for token in token_ids if token not in known]:
        causal_lm(model).generation_config.eos_token_id = [*known, *added]


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to 0: the divergence is that of the policy that was sampled.

    Also in the configuration, which some layers ask anew (Falcon's); files are not written from it.
    """
    own = causal_lm(model).config
    for config in {id(c): c for c in (own, own.get_text_config())}.values():
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def recompute_activations(model: torch.nn.Module, wanted: bool) -> None:
    """Evaluation mode, but for the modules that recompute activations in training mode alone.

    What else that mode does (noise of routers, dropout by a configuration) would make of a pass
    another than the one that was sampled.
    """
    model.eval()
    for module in model.modules():
        if wanted and getattr(module, "gradient_checkpointing", False):
            module.training = True


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Passes in `dtype`, whatever the weights are kept in; fp32 is left as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_softcap(model: PreTrainedModel) -> None:
    """Take a model with capped attention scores (Gemma 2) off SDPA, which cannot cap.

    transformers from 5.21 or so refuses the pair; 5.20 leaves the cap out and says nothing.
    """
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if capped and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
