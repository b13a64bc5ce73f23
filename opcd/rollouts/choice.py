"""Which engine makes the rollouts."""

import logging

import torch

from opcd.errors import InputError
from opcd.models.lm import causal_lm
from opcd.passes.plan import Plan
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.protocol import RolloutEngine
from opcd.rollouts.static import StaticEngine, why_not_static

log = logging.getLogger(__name__)


def build_engine(
    name: str,
    model: torch.nn.Module,
    batch_size: int,
    plan: Plan,
    max_tokens_per_pass: int = 4096,  # new ones, of prompts
) -> RolloutEngine:
    """The engine called `name`; `auto` takes static on a GPU where it is exact, else generate.

    Decoding on a GPU is bound by the launches of small kernels, and static replays a step of them
    as one graph. A trial here finds out whether it is exact on the model; it needs the autocast
    context of the rollouts around it. On a CPU no launch is saved and little is gained
    (benchmarks/bench_rollout.py), so generate stays, which everybody knows.

    Raises InputError for `static` on a model that it does not suit.
    """
    device = causal_lm(model).device
    if name == "static" or (name == "auto" and device.type == "cuda"):
        reason = why_not_static(model, plan)
        if reason is None:
            return StaticEngine(model, batch_size, max_tokens_per_pass)
        if name == "static":
            kind = type(causal_lm(model)).__name__
            raise InputError(
                f"rollout_engine static must suit the model, got {kind}: {reason}; "
                f"pass auto or generate"
            )
        log.warning("rollouts use transformers.generate, not a static cache: %s", reason)
    return TransformersEngine(model, batch_size, plan.shares_prefix, max_tokens_per_pass)
