"""How a model's passes can share a prefix: the fastest way that this model computes exactly."""

import logging
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.errors import InputError
from opcd.models.lm import causal_lm, max_positions, vocabulary_rows
from opcd.passes.agreement import Agreement
from opcd.passes.hidden import Row, completion_rows, computes_again, scored_hidden
from opcd.passes.packed import packing_backends
from opcd.passes.prefix import (
    SharedPrefix,
    UnsupportedModelError,
    common_prefix,
    tokens_that_pay,
    worthwhile_prefix,
)

log = logging.getLogger(__name__)

TRIAL = (24, 40)  # tokens that are scored in either sequence


class Plan(NamedTuple):
    """How passes are made, and why."""

    mode: str  # "packed", "padded" (both behind one prefix) or "recompute": it is in every sequence
    backend: str
    reason: str
    with_gradients: str = "plain"  # what computes packed attention where gradients are asked for

    @property
    def packed(self) -> bool:
        """Whether sequences lie in one row, without padding and without copies of the prefix."""
        return self.mode == "packed"

    @property
    def shares_prefix(self) -> bool:
        """Whether a prefix is computed once."""
        return self.mode != "recompute"

    def packs(self, device_type: str, grad: bool) -> bool:
        """Whether a pass is packed. Plain attention keeps its scores for the backward, which on a
        GPU costs more than padded rows and their fused attention do."""
        fused = device_type == "cpu" or "plain" not in self.with_gradients
        return self.packed and (fused or not grad)


WHOLE = Plan("recompute", "padded rows", "asked for")


@torch.no_grad()
def find_plan(
    model: torch.nn.Module,
    prefix_ids: Sequence[int],
    record: Callable[[], SharedPrefix] | None = None,
) -> Plan:
    """Score two short sequences in every way, from the slowest up, and stop where one differs.

    A difference counts that is beyond the noise of the model in its dtype, see `Agreement`.
    `record` hands out the recorded prefix; without it one is recorded for the test alone.
    """
    ids = list(prefix_ids)
    prompts, completions = _trial(model, ids)
    whole = completion_rows([[*ids, *prompt] for prompt in prompts], completions)
    try:
        full = scored_hidden(model, whole)
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # whatever a model's code says to a batch with its positions
        raise UnsupportedModelError(
            f"{type(causal_lm(model)).__name__} must make a pass over a batch of sequences, given "
            f"their positions, but fails with {' '.join(str(error).split())[:200]!r}; check that "
            f"it runs by itself; if it does, this architecture is not supported"
        ) from error
    rows = "padded rows"
    try:
        prefix = record() if record is not None else SharedPrefix(model, ids)
        behind = completion_rows(prompts, completions, prefix)
        scored_hidden(model, behind)  # what it changes in the prefix would show in the second pass
        padded = scored_hidden(model, behind)
        agreement = Agreement(model, full, behind, padded)
        wrong = agreement.wrong(padded)
    except UnsupportedModelError as error:
        return Plan("recompute", rows, str(error))
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # what a model's code says to a cache that begins with a prefix
        return Plan("recompute", rows, " ".join(str(error).split())[:200])
    if wrong:
        return Plan("recompute", rows, f"behind the recorded prefix {wrong}")
    states = "" if prefix.only_attention else ", other states copied"
    slower = Plan("padded", f"{rows}, expanded DynamicCache{states}", "")
    try:
        backends = packing_backends(model, prefix)
        packed = scored_hidden(model, behind, packed=True)
    except UnsupportedModelError as error:
        return slower._replace(reason=str(error))
    except (torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:  # or what a kernel or the model's own attention refuses
        return slower._replace(reason=" ".join(str(error).split())[:200])
    if wrong := agreement.wrong(packed):
        log.warning("sequences are padded, not packed: in a packed row %s", wrong)
        return slower._replace(reason=f"in a packed row {wrong}")
    gap = agreement.gap(packed)
    reason = f"a full pass gives the same to {gap:.1g} nats a token"
    return Plan("packed", backends.forward, reason, backends.with_gradients)


def _trial(
    model: torch.nn.Module, prefix_ids: list[int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Two prompts and completions of the prefix's own tokens, as long as the model has room."""
    pool = prefix_ids
    if len(set(pool)) < 8:  # tokens that differ, or a leak between sequences would not show
        vocabulary = vocabulary_rows(model)
        pool = [(pool[0] + k) % vocabulary for k in range(8)]
    room = (max_positions(causal_lm(model).config) or 2**31) - len(prefix_ids)
    prompts = [prompt[: max(1, room - TRIAL[0])] for prompt in (pool[-1:], pool[-5:-2])]
    completions = [
        [*islice(cycle(pool), max(1, min(length, room - len(prompt))))]
        for prompt, length in zip(prompts, TRIAL, strict=True)
    ]
    return prompts, completions


def planned_hidden(
    model: torch.nn.Module, rows: Sequence[Row], plan: Plan
) -> Tensor:  # (N, D), with gradients where they are enabled
    """`scored_hidden` of whole sequences; what their prompts start with is computed once."""
    if computes_again(model):
        # The backward runs the layers again, behind the pass: without its cache and its attention.
        return scored_hidden(model, rows)
    prompts = [row.token_ids[: row.spans[0][0]] for row in rows]
    device, grad = causal_lm(model).device.type, torch.is_grad_enabled()
    if plan.packs(device, grad):
        shared = worthwhile_prefix(prompts, tokens_that_pay(device, grad, in_row=True))
        return scored_hidden(model, rows, packed=True, shared=shared)
    longest = max((len(row.token_ids) for row in rows), default=0)
    prefix = common_prefix(model, prompts, longest) if plan.shares_prefix else None
    behind = [row.behind(prefix) for row in rows]
    return scored_hidden(model, behind, takes_cache=plan.shares_prefix)
