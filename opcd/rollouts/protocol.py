"""What turns prompts into completions, and episodes: the rollouts of training and evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from opcd.episodes import Episode, Prompt
from opcd.rollouts.noise import streams
from opcd.rollouts.stops import StopStrings


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn."""

    max_completion_tokens: int
    temperature: float = 1.0  # 0 is greedy
    # Of the distribution at that temperature the `top_k` likeliest tokens (0: all), and of these
    # the likeliest until they hold `top_p`; as they stand here the whole, unaltered distribution.
    top_k: int = 0
    top_p: float = 1.0
    stop: StopStrings | None = None

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)

    def finished(self, token_ids: Sequence[int], eos: Sequence[int]) -> tuple[list[int], str]:
        """A completion cut behind what ends it, EOS or a stop string; "stop", or "length"."""
        ids = [*token_ids]
        at = next((i for i, token in enumerate(ids) if token in eos), None)
        ids = ids if at is None else ids[: at + 1]
        if self.stop is not None and (end := self.stop.end(ids)) is not None:
            return ids[:end], "stop"
        return ids, "length" if at is None else "stop"


@dataclass(frozen=True)
class Rollout:
    """One completion."""

    prompt_token_ids: list[int]
    # Ends with the EOS token, or the one that completes a stop string, if the model chose that.
    completion_token_ids: list[int]
    finish_reason: str  # "stop" or "length"
    weights_version: int


class RolloutEngine(Protocol):
    """Anything that turns prompts into completions: token ids in, token ids out."""

    name: str  # as the configuration calls it

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        streams: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """A completion of each prompt, in order.

        `streams` are 64-bit numbers (`noise.streams`), one a completion: with its position they say
        what a token draws. Greedy completions need none.
        """
        ...

    def open(self, prompts: Sequence[Sequence[int]]) -> "Conversations":
        """Conversations that begin with these tokens, one a prompt, to be completed turn by turn.

        Weights must not change while they are open, and the autocast context stays the same.
        """
        ...

    def sync(self, student: torch.nn.Module, version: int) -> None:
        """Take over the student's weights."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


class Conversations(Protocol):
    """Sequences that grow by turns; what a turn has computed stays for the next one.

    Each row has its own tokens: a prompt, then completions and what is put behind them. Keys and
    values of a token are computed once, whoever wrote it.
    """

    @property
    def token_ids(self) -> list[list[int]]:
        """All tokens of each row so far."""
        ...

    def complete(
        self, params: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[Rollout | None]:
        """A completion behind what each row holds, which it holds from now on; None: it has ended.

        `streams` as in `RolloutEngine.generate`, one a row, and others for each turn.
        """
        ...

    def append(self, token_ids: Sequence[Sequence[int]]) -> None:
        """Put tokens behind each row: what a user says next, a tool's result. [] ends a row.

        Raises ValueError for tokens behind a row that has ended.
        """
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


def complete(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    seed: int,
    step: int,
    n: int = 1,
) -> list[Episode]:
    """Episodes of n completions of each prompt without its context; of one prompt together."""
    repeated = [p for p in prompts for _ in range(n)]
    numbers = streams(seed, step, prompts, n)
    rollouts = engine.generate([p.student_ids for p in repeated], params, numbers)
    return [
        Episode.of_completion(prompt, rollout.completion_token_ids, rollout.finish_reason)
        for prompt, rollout in zip(repeated, rollouts, strict=True)
    ]


def stream_tensor(
    streams: Sequence[int] | None, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> torch.Tensor:  # (B,) int64, on the CPU
    """The streams of a call, zeros where it is greedy."""
    if streams is None:
        if params.temperature > 0:
            raise ValueError(
                "completions that are sampled must have a stream each, got none; pass "
                "streams=noise.streams(seed, step, prompts)"
            )
        streams = [0] * len(prompts)
    if len(streams) != len(prompts):
        raise ValueError(
            f"there must be one stream a completion, got {len(streams)} for {len(prompts)}"
        )
    return torch.tensor(list(streams), dtype=torch.long)
