"""What a step trains on."""

from collections.abc import Sequence
from typing import Protocol

import torch

from opcd.config import TrainConfig
from opcd.episodes import Episode, Prompt
from opcd.rollouts.protocol import RolloutEngine, SamplingParams, complete


class Source(Protocol):
    """Where the episodes of a step come from."""

    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        """Those of step number `step`, from 0; `sampler` draws from the student as it is now."""
        ...


class OnPolicy:
    """The student's own completions of the training prompts."""

    def __init__(self, prompts: Sequence[Prompt], config: TrainConfig) -> None:
        self._prompts = prompts
        self._config = config
        self._sampling = SamplingParams(config.max_completion_tokens, config.temperature)

    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        """See Source.episodes."""
        config = self._config
        prompts = step_prompts(self._prompts, step, config)
        n = config.completions_per_prompt
        return complete(sampler, prompts, self._sampling, config.seed, step, n)


def step_prompts(prompts: Sequence[Prompt], step: int, config: TrainConfig) -> list[Prompt]:
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
