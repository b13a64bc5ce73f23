"""The teacher: a frozen model that scores completions behind shared prefixes."""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.errors import InputError
from opcd.models.lm import batches_by_tokens, causal_lm, head_of, max_positions, rope_differs
from opcd.passes.hidden import completion_hidden
from opcd.passes.plan import Plan, find_plan
from opcd.passes.prefix import SharedPrefix
from opcd.passes.prefix_cache import PrefixCache, StalePrefixError, weights_version
from opcd.runtime.upload import uploaded

log = logging.getLogger(__name__)

ONLY = ""  # the name of the context where there is one


class Scored(NamedTuple):
    """The teacher's side of a batch."""

    hidden: Tensor  # (N, D): the hidden state that predicts each completion token
    cu_seqlens: Tensor  # (B + 1,) int64: where each sequence's rows start


class SharedPrefixTeacher:
    """Scores completions behind the token prefix of their context, computing each prefix once.

    `prefix_ids` is one prefix, or several by the name of their context. On construction two short
    sequences are scored in every way that could be faster than full passes; `plan` is the fastest
    that agrees with those within the dtype's noise.

    `frozen` is entered around every pass; with it teacher and student can be one module, e.g.
    ``frozen=peft_model.disable_adapter``. `max_tokens_per_pass` bounds a pass's new tokens, and
    `prefix_cache_bytes` what is kept of prefixes that were not used last. ``shared=False``
    computes every sequence in full: slow, and the yardstick.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prefix_ids: Sequence[int] | Mapping[str, Sequence[int]],
        max_tokens_per_pass: int = 4096,
        frozen: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        shared: bool = True,
        prefix_cache_bytes: int = 2**31,
    ) -> None:
        self.model = model
        with frozen():
            self.head = head_of(model)
        several = prefix_ids if isinstance(prefix_ids, Mapping) else {ONLY: prefix_ids}
        _check_prefixes(model, several)
        self._prefix_ids = {name: list(ids) for name, ids in several.items()}
        self._max_tokens_per_pass = max_tokens_per_pass
        self._frozen = frozen
        self._prefixes = PrefixCache(model, prefix_cache_bytes)
        self.plan = Plan("recompute", "padded rows", "asked for")
        with torch.no_grad(), frozen():
            if shared:
                name, ids = next(iter(self._prefix_ids.items()))
                self.plan = find_plan(model, ids, lambda: self._prefixes.get(name, ids))
            self._version = weights_version(model)
        if shared and not self.plan.shares_prefix:
            log.warning("the context is computed with every sequence: %s", self.plan.reason)
        log.debug("teacher: %s with %s, %s", *self.plan)

    def refresh(self) -> None:
        """Take the model's weights as they now are: prefixes are computed again when needed."""
        self._prefixes.clear()
        with self._frozen():
            self._version = weights_version(self.model)

    @torch.no_grad()
    def score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        contexts: Sequence[str] | None = None,
    ) -> Scored:
        """Hidden states behind the prefix; `prompt_ids` are the teacher's, without the prefix.

        `contexts` names the context of each sequence where there are several. The results come in
        the order given, whatever the passes.

        Raises InputError for an empty prompt or completion (each prompt keeps at least one token
        behind the prefix, which predicts the first completion token), for a context that the
        teacher was not given, and for a sequence beyond the model's positions; StalePrefixError if
        the weights or the adapter's state are not those that the teacher was made with.
        """
        names = self._check(prompt_ids, completion_ids, contexts)
        lengths = [len(c) for c in completion_ids]
        parts: dict[int, Tensor] = {}
        with self._frozen():
            if self.plan.shares_prefix and weights_version(self.model) != self._version:
                raise StalePrefixError(
                    "the teacher must stay as it was when its prefix was computed, but its "
                    "weights, its adapter's state or its dropout have changed; call eval(), pass "
                    "frozen=model.disable_adapter if the student is the same module, or call "
                    "refresh() to score with the new weights"
                )
            for name in dict.fromkeys(names):
                members = [i for i, other in enumerate(names) if other == name]
                totals = [len(prompt_ids[i]) + lengths[i] for i in members]
                prefix, in_full = self._prefix(name, max(totals))
                size = [total + len(in_full) for total in totals]
                for batch in batches_by_tokens(size, self._max_tokens_per_pass):
                    chosen = [members[i] for i in batch]
                    hidden = completion_hidden(
                        self.model,
                        [[*in_full, *prompt_ids[i]] for i in chosen],
                        [completion_ids[i] for i in chosen],
                        prefix,
                        packed=self.plan.packed and prefix is not None,
                    )
                    split = hidden.split([lengths[i] for i in chosen])
                    parts.update(zip(chosen, split, strict=True))
        weight = self.head.weight
        ordered = [parts[i] for i in range(len(lengths))]
        packed = torch.cat(ordered) if ordered else weight.new_zeros(0, weight.shape[1])
        cu_seqlens = uploaded(torch.tensor([0, *lengths]).cumsum(0), weight.device)
        return Scored(packed, cu_seqlens)

    def _prefix(self, name: str, longest: int) -> tuple[SharedPrefix | None, list[int]]:
        """The recorded prefix; or the tokens that each sequence must start with instead.

        Some rotary frequencies depend on the longest position of a pass: a prefix can be computed
        by itself where that changes none of them.
        """
        ids = self._prefix_ids[name]
        config = causal_lm(self.model).config
        if not self.plan.shares_prefix or rope_differs(config, len(ids), len(ids) + longest):
            return None, ids
        return self._prefixes.get(name, ids), []

    def _check(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        contexts: Sequence[str] | None,
    ) -> list[str]:
        """The name of each sequence's context."""
        for what, sequences in (("prompt", prompt_ids), ("completion", completion_ids)):
            if not all(sequences):
                raise InputError(
                    f"every {what} must hold at least one token, got an empty one; leave its last "
                    f"token out of the prefix, or drop the sequence"
                )
        names = list(contexts) if contexts is not None else [ONLY] * len(prompt_ids)
        if not len(prompt_ids) == len(completion_ids) == len(names):
            raise InputError(
                f"score must get a completion and a context for each prompt, got "
                f"{len(prompt_ids)} prompts, {len(completion_ids)} completions and {len(names)} "
                f"contexts"
            )
        if unknown := set(names) - set(self._prefix_ids):
            raise InputError(
                f"contexts must be among {sorted(self._prefix_ids)}, got {sorted(unknown)}; name "
                f"one for each sequence"
            )
        limit = max_positions(causal_lm(self.model).config)
        for name, prompt, completion in zip(names, prompt_ids, completion_ids, strict=True):
            total = len(self._prefix_ids[name]) + len(prompt) + len(completion)
            if limit is not None and total > limit:
                raise InputError(
                    f"context, prompt and completion must fit the teacher's {limit} positions, got "
                    f"{len(self._prefix_ids[name])} + {len(prompt)} + {len(completion)} tokens; "
                    f"shorten the context or the completions"
                )
        return names


def _check_prefixes(model: torch.nn.Module, prefixes: Mapping[str, Sequence[int]]) -> None:
    lm = causal_lm(model)
    limit, rows = max_positions(lm.config), lm.get_input_embeddings().num_embeddings
    if not prefixes:
        raise InputError("prefix_ids must hold at least one context, got none")
    for name, ids in prefixes.items():
        what = f"the prefix of context {name!r}" if name else "the prefix"
        if not len(ids):
            raise InputError(
                f"{what} must hold at least one token, got none; the rendered prompts have no "
                f"common start"
            )
        if not 0 <= min(ids) <= max(ids) < rows:
            raise InputError(
                f"{what} must hold token ids from 0 to {rows - 1}, got {min(ids)} to {max(ids)}; "
                f"use the model's own tokenizer"
            )
        if limit is not None and len(ids) >= limit:
            raise InputError(
                f"{what} must leave room within the model's {limit} positions, got {len(ids)} "
                f"tokens; shorten the context"
            )
