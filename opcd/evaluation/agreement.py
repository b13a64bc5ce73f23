"""How far a student is from its teacher, on what the student says itself."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.config import TrainConfig
from opcd.episodes import Episode, Prompt, scored_tokens
from opcd.models.head import Head, head_of
from opcd.objective import head_divergence
from opcd.passes.hidden import Row
from opcd.passes.plan import Plan, planned_hidden
from opcd.rollouts.noise import HELD_OUT
from opcd.rollouts.protocol import RolloutEngine, SamplingParams, complete
from opcd.runtime.batches import batches_by_tokens
from opcd.teacher import SharedPrefixTeacher


class OwnSide(NamedTuple):
    """What a student says and thinks; its body is no longer needed to compare it."""

    episodes: list[Episode]
    hidden: Tensor  # (N, D), of each scored token
    head: Head


@torch.no_grad()
def own_side(
    student: torch.nn.Module,
    plan: Plan,
    engine: RolloutEngine,  # the student's
    prompts: Sequence[Prompt],
    config: TrainConfig,
) -> OwnSide:
    """Completions that the student samples, the same draws at every call, and what it thinks."""
    params = SamplingParams(config.max_completion_tokens, config.temperature)
    episodes = complete(engine, prompts, params, config.seed, HELD_OUT)
    parts: dict[int, Tensor] = {}
    lengths = scored_tokens(episodes)
    sizes = [len(e.student_ids) for e in episodes]
    for batch in batches_by_tokens(sizes, config.max_tokens_per_pass):
        rows = [Row(episodes[i].student_ids, episodes[i].student_spans) for i in batch]
        hidden = planned_hidden(student, rows, plan)
        parts.update(zip(batch, hidden.split([lengths[i] for i in batch]), strict=True))
    in_order = torch.cat([parts[i] for i in range(len(episodes))])
    return OwnSide(episodes, in_order, head_of(student))


@torch.no_grad()
def divergence_to(teacher: SharedPrefixTeacher, side: OwnSide, temperature: float) -> float:
    """Mean reverse KL to the teacher, nats a token."""
    targets = teacher.score(side.episodes)
    out = head_divergence(
        side.hidden, side.head, targets.hidden, targets.head, temperature=temperature
    )
    return out.per_token.mean().item()
