"""The order in which a run takes its rows."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from opcd.config import TrainConfig

T = TypeVar("T")  # a conversation: what comes of one row


def step_rows(rows: Sequence[T], step: int, config: TrainConfig) -> list[T]:
    """The rows of step number `step` (from 0): epochs of seeded shuffles, one after another."""
    chosen = []
    order: list[int] = []
    first = step * config.prompts_per_step
    for position in range(first, first + config.prompts_per_step):
        epoch, offset = divmod(position, len(rows))
        if not order or offset == 0:
            generator = torch.Generator().manual_seed(config.seed + 7919 * epoch)
            order = torch.randperm(len(rows), generator=generator).tolist()
        chosen.append(rows[order[offset]])
    return chosen
