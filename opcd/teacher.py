"""The teacher: a frozen model that scores completions behind one shared prefix."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.lm import batches_by_length, completion_hidden, head_of
from opcd.objective import head_divergence
from opcd.prefix import SharedPrefix, UnsupportedCacheError

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """How the teacher scores, and why."""

    mode: str  # "cached": the prefix is computed once; "recompute": with every sequence
    backend: str
    reason: str


class Scored(NamedTuple):
    """The teacher's side of a batch."""

    hidden: Tensor  # (N, D): the hidden state that predicts each completion token
    cu_seqlens: Tensor  # (B + 1,) int64: where each sequence's rows start


class SharedPrefixTeacher:
    """Scores completions with `prefix_ids` in front of every prompt, computing the prefix once.

    On construction two short sequences are scored with and without the cache. Where they differ by
    more than the dtype's noise, every sequence is computed in full and `plan` says so.

    `frozen` is entered around every pass; with it teacher and student can be one module, e.g.
    ``frozen=peft_model.disable_adapter``. The weights must not change while the teacher is in use.
    ``shared=False`` computes every sequence in full: slow, and the yardstick.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prefix_ids: Sequence[int],
        sequences_per_pass: int = 16,
        frozen: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        shared: bool = True,
    ) -> None:
        self.model = model
        self.head = head_of(model)
        self._prefix_ids = list(prefix_ids)
        self._sequences_per_pass = sequences_per_pass
        self._frozen = frozen
        self._prefix: SharedPrefix | None = None
        self.plan = Plan("recompute", "padded rows", "asked for")
        if shared:
            with torch.no_grad(), frozen():
                self.plan = self._record()
        if shared and self.plan.mode == "recompute":
            log.warning("the context is computed with every sequence: %s", self.plan.reason)
        log.debug("teacher: %s with %s, %s", *self.plan)

    @property
    def shares_prefix(self) -> bool:
        """Whether the prefix is computed once: the architecture's cache is exact."""
        return self._prefix is not None

    @torch.no_grad()
    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
    ) -> Scored:
        """Hidden states behind the prefix; `prompt_ids` are the teacher's, without the prefix.

        Raises ValueError for an empty prompt or completion: each prompt keeps at least one token
        behind the prefix, which predicts the first completion token.
        """
        for name, sequences in (("prompt", prompt_ids), ("completion", completion_ids)):
            if not all(sequences):
                raise ValueError(
                    f"every {name} must hold at least one token, got an empty one; leave its last "
                    f"token out of the prefix, or drop the sequence"
                )
        lengths = [len(c) for c in completion_ids]
        totals = [len(p) + n for p, n in zip(prompt_ids, lengths, strict=True)]
        parts: dict[int, Tensor] = {}
        with self._frozen():
            for batch in batches_by_length(totals, self._sequences_per_pass):
                hidden = self._hidden(
                    [prompt_ids[i] for i in batch], [completion_ids[i] for i in batch]
                )
                parts.update(zip(batch, hidden.split([lengths[i] for i in batch]), strict=True))
        weight = self.head.weight
        ordered = [parts[i] for i in range(len(lengths))]
        packed = torch.cat(ordered) if ordered else weight.new_zeros(0, weight.shape[1])
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(weight.device)
        return Scored(packed, cu_seqlens)

    def _hidden(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> Tensor:
        if self._prefix is not None:
            return completion_hidden(self.model, prompt_ids, completion_ids, self._prefix)
        whole = [[*self._prefix_ids, *p] for p in prompt_ids]
        return completion_hidden(self.model, whole, completion_ids)

    def _record(self) -> Plan:
        """Record the prefix, score two short sequences both ways, and keep it if they agree."""
        ids = self._prefix_ids
        probes = [ids[-1:], (ids[-5:-2] or ids[:1])], [ids[:3], ids[:7]]
        full = self._hidden(*probes)
        try:
            self._prefix = SharedPrefix(self.model, ids)
        except UnsupportedCacheError as error:
            return Plan("recompute", "padded rows", str(error))
        cached = self._hidden(*probes)
        divergence = head_divergence(cached, self.head, full, self.head).per_token.max().item()
        bound = 1e-4 if cached.dtype == torch.float32 else 0.05
        if not divergence <= bound:
            self._prefix = None
            reason = f"cached and full passes differ by {divergence:.2g} nats a token"
            return Plan("recompute", "padded rows", f"{reason}, more than {bound:g}")
        reason = f"a full pass gives the same to {divergence:.1g} nats a token"
        return Plan("cached", "padded rows, expanded DynamicCache", reason)


def cache_is_exact(model: torch.nn.Module, prefix_ids: Sequence[int]) -> bool:
    """Whether passes behind a recorded prefix equal full passes on this model."""
    return SharedPrefixTeacher(model, prefix_ids).shares_prefix
