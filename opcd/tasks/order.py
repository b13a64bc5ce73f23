"""The order in which a run takes its prompts."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from opcd.config import TrainConfig

T = TypeVar("T")  # a prompt, or a recorded conversation


def step_prompts(prompts: Sequence[T], step: int, config: TrainConfig) -> list[T]:
    """The prompts of step number `step` (from 0): epochs of seeded shuffles, one after another."""
    chosen = []
    order: list[int] = []
    first = step * config.prompts_per_step
    for position in range(first, first + config.prompts_per_step):
        epoch, offset = divmod(position, len(prompts))
        if not order or offset == 0:
            generator = torch.Generator().manual_seed(config.seed + 7919 * epoch)
            order = torch.randperm(len(prompts), generator=generator).tolist()
        chosen.append(prompts[order[offset]])
    return chosen
