"""The output head of a causal LM, as it is and not as its configuration names it."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opcd.errors import InputError
from opcd.models.lm import causal_lm, evaluating, transformer, vocabulary_rows
from opcd.models.sdpa import without_cudnn_attention

SAMPLE = 2048  # of the vocabulary
LARGEST = 200.0  # logits of the trial: every cap shows
SMALL = 1e-3  # of the largest logit: what rounding may make in fp32
TRIAL_TOKENS = 8


class Head(NamedTuple):
    """The map from hidden states to logits: ``softcap(scale · hidden @ weight.T + bias)``.

    `scored_hidden` has applied the scale already.
    """

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    scale: float


class _Transform(NamedTuple):
    """What a model does around its head's product."""

    before: float  # hidden states are multiplied by it
    behind: float  # and logits, with the bias
    softcap: float | None


_KNOWN: "WeakKeyDictionary[torch.nn.Module, _Transform]" = WeakKeyDictionary()


def head_of(model: torch.nn.Module) -> Head:
    """The output head of a causal LM, its weights as they now are.

    What the model does around the product is measured, once a model: a trial compares hidden
    states, the head's input and output, and logits. Scales and a cap count as found if the
    configuration has their number, under whatever name.

    Raises InputError for a model whose logits are another function of its hidden states, and for
    an adapter on the head.
    """
    lm = causal_lm(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError(
            f"an adapter must change the model's layers, got {type(model).__name__} with virtual "
            f"tokens, which are not in its passes here; use LoRA or another adapter of layers"
        )
    output = _output(lm)
    if lm not in _KNOWN:
        _check_causal(lm)
        _KNOWN[lm] = _measure(lm, output)
    before, behind, softcap = _KNOWN[lm]
    bias = getattr(output, "bias", None)
    if bias is not None and behind != 1:
        bias = bias * behind
    return Head(output.weight, bias, softcap, before * behind)


def take_plain_head(model: torch.nn.Module) -> None:
    """Let `head_of` take a model's logits as a product with its head, untried.

    For models without numbers, of which only sizes count.
    """
    _KNOWN[causal_lm(model)] = _Transform(1.0, 1.0, None)


def _output(lm: Any) -> Any:
    name, output = type(lm).__name__, lm.get_output_embeddings()
    if output is None:
        raise InputError(f"{name} must have an output head (get_output_embeddings), got none")
    weight = getattr(output, "weight", None)
    if not isinstance(weight, Tensor) or _is_packed(weight):
        kind = type(output) if not isinstance(weight, Tensor) else type(weight.data)
        raise InputError(
            f"the head of {name} must hold its weight as a tensor of numbers, got {kind.__name__}; "
            f"leave the head out of what is quantised"
        )
    if weight.is_meta and (hasattr(output, "_hf_hook") or lm not in _KNOWN):
        raise InputError(
            f"the head of {name} must lie on a device, got one on 'meta'; load the model onto one "
            f"device, without offloading"
        )
    if isinstance(output, BaseTunerLayer) and not output.disable_adapters:
        raise InputError(
            f"the head of {name} must be trained whole or not at all, got an adapter on it, which "
            f"the loss would not see; leave it out of target_modules, or name it in "
            f"modules_to_save"
        )
    return output


def _is_packed(weight: Tensor) -> bool:
    """Whether it is quantised: made of other tensors, and not sharded, or of whole numbers."""
    made = is_traceable_wrapper_subclass(weight) and not hasattr(weight, "full_tensor")
    return made or not weight.is_floating_point()


@torch.no_grad()
def _measure(lm: Any, output: Any) -> _Transform:
    hidden, head_input, every_output, every_logit = _trial(lm, output)
    width = min(every_output.shape[-1], every_logit.shape[-1])
    rows = torch.arange(0, width, max(1, width // SAMPLE), device=hidden.device)
    head_output, logits = every_output[:, rows], every_logit[:, rows]
    rounding = SMALL if output.weight.dtype == torch.float32 else 20 * SMALL
    product = head_input @ _exact(output.weight[rows]).T
    if (bias := getattr(output, "bias", None)) is not None:
        product = product + _exact(bias[rows])
    numbers = sorted({1.0, *_numbers(lm.config.get_text_config().to_dict())})
    scales = sorted({*numbers, *(1 / x for x in numbers)}, key=lambda x: abs(x - 1))

    def differs(a: Tensor, b: Tensor) -> float:
        return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()

    def scale_of(a: Tensor, b: Tensor) -> float:
        """The number of the configuration that makes `a` from `b`, as far as there is one."""
        found = ((a * b).sum() / (b * b).sum()).item()
        return min(scales, key=lambda x: abs(x - found))

    before = scale_of(head_input, hidden) if hidden.shape == head_input.shape else 1.0
    wrong = {
        "the head's input is not the body's hidden states, scaled": hidden.shape != head_input.shape
        or differs(before * hidden, head_input) > rounding,
        "the head is not a product with its weight": differs(product, head_output) > rounding,
    }
    behind = scale_of(logits, head_output)
    found = _Transform(before, behind, None)
    if differs(behind * head_output, logits) > rounding:
        capped = {
            (scale, cap): differs(cap * torch.tanh(scale * head_output / cap), logits)
            for cap in numbers
            if cap >= 0.9 * logits.abs().max().item()
            for scale in scales
        }
        best = min(capped, key=lambda x: capped[x], default=(1.0, 0.0))
        wrong["what follows the head is no scale and no cap that the configuration names"] = (
            capped.get(best, 1.0) > rounding
        )
        found = _Transform(before, *best)
    if reasons := [reason for reason, holds in wrong.items() if holds]:
        raise InputError(
            f"the logits of {type(lm).__name__} must be softcap(scale · lm_head(hidden)), but "
            f"{reasons[0]}; this architecture is not supported"
        )
    return found


@torch.no_grad()
def _check_causal(lm: Any) -> None:
    """Raise InputError if later tokens change the hidden states of those before them."""
    ids = _trial_ids(lm)
    whole_precision = torch.autocast(ids.device.type, enabled=False)
    with evaluating(lm), whole_precision, without_cudnn_attention():
        body = transformer(lm)
        whole, part = (
            _exact(body(input_ids=x, use_cache=False).last_hidden_state[0])
            for x in (ids, ids[:, : TRIAL_TOKENS - 3])
        )
    changes = (whole[: len(part)] - part).norm(dim=-1) / part.norm(dim=-1).clamp_min(1e-30)
    # The median: rounding may send single tokens to other experts.
    if changes.median().item() > (SMALL if lm.dtype == torch.float32 else 100 * SMALL):
        raise InputError(
            f"the model must be causal, but later tokens change the hidden states of earlier ones "
            f"in {type(lm).__name__}; this architecture is not supported"
        )


def _trial_ids(lm: Any) -> Tensor:  # (1, TRIAL_TOKENS)
    ids = torch.arange(2, 2 + TRIAL_TOKENS, device=lm.get_input_embeddings().weight.device)
    return ids[None] * (vocabulary_rows(lm) // (TRIAL_TOKENS + 3))


def _trial(lm: Any, output: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the head's input and output, and logits, in fp64, (T, …) each.

    The head's input is enlarged on its way in, so that logits are large whatever the weights.
    """
    seen: dict[str, Tensor] = {}

    def enlarged(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        plain = torch.nn.functional.linear(args[0], output.weight.to(args[0].dtype))
        factor = LARGEST / plain.abs().max().clamp_min(1e-9)
        seen["factor"], seen["input"] = factor, args[0] * factor
        return (seen["input"], *args[1:])

    def keep(_module: Any, _args: Any, result: Tensor) -> None:
        seen["output"] = result

    ids = _trial_ids(lm)
    with ExitStack() as stack:
        stack.enter_context(evaluating(lm))
        stack.enter_context(torch.autocast(ids.device.type, enabled=False))
        stack.enter_context(without_cudnn_attention())
        stack.callback(output.register_forward_pre_hook(enlarged).remove)
        stack.callback(output.register_forward_hook(keep).remove)
        hidden = transformer(lm)(input_ids=ids, use_cache=False).last_hidden_state
        logits = lm(input_ids=ids, use_cache=False).logits
    if len(seen) < 3 or seen["output"].shape[:-1] != ids.shape or logits.shape[:-1] != ids.shape:
        raise InputError(
            f"{type(lm).__name__} must use its output head once for each token in a pass, but did "
            f"not; this architecture is not supported"
        )
    hidden, given, made = hidden * seen["factor"], seen["input"], seen["output"]
    return _exact(hidden[0]), _exact(given[0]), _exact(made[0]), _exact(logits[0])


def _exact(x: Tensor) -> Tensor:
    """In fp64, which not every device has."""
    return x.cpu().double()


def _numbers(settings: dict[str, Any]) -> Iterator[float]:
    """Every positive number of a configuration."""
    for value in settings.values():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e6:
            yield float(value)
