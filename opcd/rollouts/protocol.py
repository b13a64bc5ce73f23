"""What turns prompts into completions, and episodes: the rollouts of training and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from opcd.episodes import Episode, Prompt


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn."""

    max_completion_tokens: int
    temperature: float = 1.0  # 0 is greedy; otherwise the whole, unaltered distribution


@dataclass(frozen=True)
class Rollout:
    """One completion."""

    prompt_token_ids: list[int]
    completion_token_ids: list[int]  # ends with the EOS token that the model chose, if it did
    finish_reason: str  # "stop" or "length"
    weights_version: int


class RolloutEngine(Protocol):
    """Anything that turns prompts into completions: token ids in, token ids out."""

    name: str  # as the configuration calls it

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1
    ) -> list[Rollout]:
        """n completions of each prompt, those of one prompt next to each other, in order."""
        ...

    def sync(self, student: torch.nn.Module, version: int) -> None:
        """Take over the student's weights."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def complete(
    engine: RolloutEngine, prompts: Sequence[Prompt], params: SamplingParams, n: int = 1
) -> list[Episode]:
    """Episodes of n completions of each prompt without its context."""
    rollouts = engine.generate([p.student_ids for p in prompts], params, n)
    repeated = [p for p in prompts for _ in range(n)]
    return [
        Episode.of_completion(prompt, rollout.completion_token_ids, rollout.finish_reason)
        for prompt, rollout in zip(repeated, rollouts, strict=True)
    ]
