"""How far a served model's log-probabilities lie from those of the exported one.

Of the tokens that the server answered, in nats. Likeliest tokens alone do not tell models apart:
one that was hardly trained answers as before. Both programs read the same tokens, so that nothing
but rounding is between them where the weights are the same.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from opcd.episodes import Episode, Prompt
from opcd.evaluation.agreement import student_side
from opcd.evaluation.contenders import LoadedModel
from opcd.models.head import Head

NEAR = 0.1  # of logits and log-probabilities: a thousand times what rounding in float32 is
TIMES = 2.0  # as far from float32 as transformers in the same dtype, in 16 bits
ROWS = 256  # tokens whose logits are there at once


class Apart(NamedTuple):
    """How far, and how far it may be; not a number where the server gave none."""

    nats: float  # in float32 the largest difference; in 16 bits the root mean square
    own: float | None  # in 16 bits: how far transformers in that dtype is from float32
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether rounding explains it."""
        return self.nats <= self.allowed

    @property
    def words(self) -> str:
        """For people."""
        what = "the log-probabilities of its tokens differ"
        if self.own is None:
            return f"{what} by at most {self.nats:.2g} nats (allowed: {self.allowed:.2g})"
        return (
            f"{what} from float32's by {self.nats:.2g} nats (root mean square; transformers' own "
            f"by {self.own:.2g}, allowed: {self.allowed:.2g})"
        )


def apart(
    served: Sequence[float],  # log-probabilities, a token each
    ours: Sequence[float],  # transformers' of the same tokens, in the same dtype
    exact: Sequence[float] | None,  # in float32, where that is another dtype
) -> Apart:
    """In float32 every token's may differ by `NEAR`. In 16 bits single ones say little: there the
    error against float32 may be `TIMES` that of transformers, or `NEAR`.

    Without tokens nothing is known, and nothing agrees.
    """
    if exact is None:
        return Apart(max(_errors(served, ours), default=math.nan), None, NEAR)
    own = _root_mean_square(_errors(ours, exact))
    return Apart(_root_mean_square(_errors(served, exact)), own, max(NEAR, TIMES * own))


@torch.inference_mode()
def token_logprobs(
    loaded: LoadedModel, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]
) -> list[float]:
    """What a model makes of completions without the context, all their tokens in order, in nats.

    Its logits are in its own dtype, as it is used; their softmax in float32.
    """
    pairs = zip(prompts, completions, strict=True)
    episodes = [Episode.of_completion(prompt, ids) for prompt, ids in pairs if ids]
    if not episodes:
        return []
    hidden, head = student_side(loaded.model, loaded.plan, episodes, loaded.setup.config)[1:]
    ids = torch.tensor([t for e in episodes for t in e.scored_ids], device=hidden.device)
    parts = zip(hidden.split(ROWS), ids.split(ROWS), strict=True)
    return [x for rows, tokens in parts for x in _logprobs(rows, head, tokens).tolist()]


def _logprobs(hidden: Tensor, head: Head, ids: Tensor) -> Tensor:  # (N, D), (N,) to (N,) fp32
    logits = linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    if head.softcap:
        logits = head.softcap * (logits / head.softcap).tanh()
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def unit_at(logit: float, dtype: torch.dtype) -> float:
    """Of the last place of a number in a dtype: from it to the next."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(logit) or 1.0))


def _errors(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Differences without their signs; the first is no number where any is none."""
    found = [abs(a - b) for a, b in zip(ones, others, strict=True)]
    return [math.nan] if any(map(math.isnan, found)) else found


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in values) / len(values)) if values else math.nan
