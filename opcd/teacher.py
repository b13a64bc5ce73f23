"""The teacher: a frozen model that scores completions behind shared prefixes."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import cast, overload

import torch
from torch import Tensor

from opcd.config import TrainConfig
from opcd.episodes import Episode, Prompt, scored_tokens
from opcd.errors import InputError
from opcd.models.head import head_of
from opcd.models.lm import (
    causal_lm,
    check_causal_lm,
    evaluating,
    max_positions,
    rope_differs,
    rope_side,
    vocabulary_rows,
)
from opcd.objective import Targets
from opcd.passes.hidden import Row, scored_hidden
from opcd.passes.plan import WHOLE, find_plan
from opcd.passes.prefix import SharedPrefix
from opcd.passes.prefix_cache import PrefixCache
from opcd.passes.sequences import Mask, TokenIds, token_lists, whole_numbers
from opcd.passes.staleness import StalePrefixError, WeightsWatch
from opcd.runtime.batches import batches_by_tokens

log = logging.getLogger(__name__)

ONLY = ""  # the name of the context where there is one


class SharedPrefixTeacher:
    """Scores completions behind the token prefix of their context, computing each prefix once.

    Passes are made in evaluation mode and under the autocast that was on at construction, whatever
    the caller's; the module's own mode comes back.

    `prefix_ids` is one prefix, or several by the name of their context. On construction two short
    sequences are scored in every way that could be faster than full passes; `plan` is the fastest
    that agrees with those within the dtype's noise.

    `frozen` is entered around every pass, also by whoever else uses the model as the teacher; with
    it teacher and student can be one module, e.g. ``frozen=peft_model.disable_adapter``.
    `max_tokens_per_pass` bounds a pass's new tokens, and `prefix_cache_bytes` what is kept of
    prefixes that were not used last. ``shared=False``
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
        check_causal_lm(model)
        if any(hasattr(p, "full_tensor") for p in model.parameters()):
            raise InputError(
                "the teacher's weights must be whole in each process, got sharded ones (DTensor); "
                "make the teacher of a model that is not sharded: it needs no gradients and no "
                "optimizer"
            )
        if any(p.is_meta for p in model.parameters()):
            raise InputError(
                "the teacher's weights must lie on a device, got some on 'meta', where accelerate "
                "leaves what it offloads; load the model onto one device, quantised if it is too "
                "large"
            )
        if isinstance(frozen, AbstractContextManager):
            raise InputError(
                f"frozen must be a function that makes a context manager, got a "
                f"{type(frozen).__name__} itself; pass the function, without calling it"
            )
        self.model = model
        several = prefix_ids if isinstance(prefix_ids, Mapping) else {ONLY: prefix_ids}
        ids = whole_numbers([*several.values()], "prefix")
        self._prefix_ids = dict(zip(several, ids, strict=True))
        _check_prefixes(model, self._prefix_ids)
        self._max_tokens_per_pass = max_tokens_per_pass
        self.frozen = frozen
        self._prefixes = PrefixCache(model, prefix_cache_bytes)
        self.plan = WHOLE
        kind = causal_lm(model).device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.no_grad(), self._as_made():
            self.head = head_of(model)
            if shared:
                name, first = next(iter(self._prefix_ids.items()))
                self.plan = find_plan(model, first, lambda: self._prefixes.get(name, first))
            self._watch = WeightsWatch(model)
        if shared and not self.plan.shares_prefix:
            _warn_once(f"the context is computed with every sequence: {self.plan.reason}")
        log.debug("teacher: %s with %s, %s", *self.plan)

    def refresh(self) -> None:
        """Take the model's weights as they now are: prefixes are computed again when needed."""
        self._prefixes.clear()
        with self._as_made():
            self.head = head_of(self.model)
            self._watch.take()

    def add_context(self, name: str, token_ids: Sequence[int]) -> None:
        """Know one more context; its prefix is computed when it is first needed.

        Raises InputError for a name that stands for other tokens already, and for tokens that do
        not fit the model.
        """
        known = self._prefix_ids.get(name)
        if known is not None and known != list(token_ids):
            raise InputError(
                f"a context's name must keep its meaning, but {name!r} stands for {len(known)} "
                f"other tokens already; give the new context another name"
            )
        (ids,) = whole_numbers([token_ids], "prefix")
        _check_prefixes(self.model, {name: ids})
        self._prefix_ids[name] = ids

    @overload
    def score(self, episodes: Sequence[Episode], /) -> Targets: ...

    @overload
    def score(
        self,
        prompt_ids: TokenIds,
        completion_ids: TokenIds,
        contexts: Sequence[str] | None = None,
        *,
        prompt_mask: Mask = None,
        completion_mask: Mask = None,
    ) -> Targets: ...

    @torch.no_grad()
    def score(
        self,
        prompt_ids: Sequence[Episode] | TokenIds,
        completion_ids: TokenIds | None = None,
        contexts: Sequence[str] | None = None,
        *,
        prompt_mask: Mask = None,
        completion_mask: Mask = None,
    ) -> Targets:
        """What the teacher makes of episodes: hidden states behind their contexts, and its head.

        In short, ``score(prompt_ids, completion_ids, contexts)`` scores completions behind prompts:
        the teacher's, without the prefix; `contexts` names the context of each sequence where there
        are several. They are lists of token ids (or of tensors, arrays), or padded (B, T) tensors
        with masks that are 1 on real tokens, pads on either side. Results come in the order given,
        whatever the passes: of a padded batch ``hidden`` has the rows that its mask marks.

        Raises InputError for an empty prompt or completion (each prompt keeps at least one token
        behind the prefix, which predicts the first completion token), for token ids that are not
        the model's, for a mask with a gap (score turns between others as episodes), for a context
        that the teacher was not given, and for a sequence beyond the model's positions;
        StalePrefixError if the weights or the adapter's state are not those that the teacher was
        made with.
        """
        if completion_ids is None:
            episodes = cast(Sequence[Episode], prompt_ids)
        else:
            prompts = token_lists(cast(TokenIds, prompt_ids), prompt_mask, "prompt")
            completions = token_lists(completion_ids, completion_mask, "completion")
            episodes = _completed(prompts, completions, contexts)
        self._check(episodes)
        lengths = scored_tokens(episodes)
        with self._as_made():
            self._check_version()
            parts: dict[int, Tensor] = {}
            for members, rows in self._together(episodes):
                sizes = [len(row.token_ids) for row in rows]
                for batch in batches_by_tokens(sizes, self._max_tokens_per_pass):
                    behind = rows[0].prefix is not None
                    hidden = scored_hidden(
                        self.model, [rows[i] for i in batch], self.plan.packed and behind
                    )
                    split = hidden.split([lengths[members[i]] for i in batch])
                    parts.update(zip((members[i] for i in batch), split, strict=True))
                del rows  # and the prefixes behind them, before others are recorded
        weight = self.head.weight
        ordered = [parts[i] for i in range(len(episodes))]
        hidden = torch.cat(ordered) if ordered else weight.new_zeros(0, weight.shape[1])
        return Targets(hidden, tuple(lengths), self.head)

    @contextlib.contextmanager
    def _as_made(self) -> Iterator[None]:
        """The conditions of every pass."""
        kind, dtype, enabled = self._autocast
        with self.frozen(), evaluating(self.model), torch.autocast(kind, dtype, enabled):
            yield

    def _together(self, episodes: Sequence[Episode]) -> Iterator[tuple[list[int], list[Row]]]:
        """Episodes that share passes, and how they are given to the model.

        In a packed row sequences may stand behind different prefixes: as many contexts go together
        as the budget of prefixes holds. Otherwise each context has passes of its own. Sequences on
        both sides of where rotary frequencies change never share one.
        """
        config = causal_lm(self.model).config
        by_name: dict[tuple[bool, str], list[int]] = {}
        for i, episode in enumerate(episodes):
            start, n = episode.teacher_spans[-1]  # the last token of which predicts nothing
            length = len(self._prefix_ids[episode.context]) + start + n - 1
            by_name.setdefault((rope_side(config, length), episode.context), []).append(i)
        members: list[int] = []
        rows: list[Row] = []
        held, last = 0, False
        for (side, name), indices in sorted(by_name.items(), key=lambda item: item[0][0]):
            if rows and side != last:
                yield members, rows
                members, rows, held = [], [], 0
            last = side
            if rows and held + self._prefixes.expected_bytes(name, self._prefix_ids[name]) > (
                self._prefixes.budget_bytes
            ):
                yield members, rows
                members, rows, held = [], [], 0
            longest = max(len(episodes[i].teacher_ids) for i in indices)
            prefix, in_full = self._prefix(name, longest)
            n = len(in_full)
            own = [
                Row(
                    [*in_full, *episodes[i].teacher_ids],
                    [(start + n, length) for start, length in episodes[i].teacher_spans],
                    prefix,
                )
                for i in indices
            ]
            if prefix is None or not self.plan.packed:
                yield indices, own
                continue
            members, rows, held = members + indices, rows + own, held + prefix.nbytes
        if rows:
            yield members, rows

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

    def _check_version(self) -> None:
        if self._watch.changed():
            raise StalePrefixError(
                "the teacher must stay as it was when its prefix was computed, but its weights or "
                "its adapter's state have changed; pass frozen=model.disable_adapter if the "
                "student is the same module, or call refresh() to score with the new weights"
            )

    def _check(self, episodes: Sequence[Episode]) -> None:
        if unknown := {e.context for e in episodes} - set(self._prefix_ids):
            raise InputError(
                f"contexts must be among {sorted(self._prefix_ids)}, got {sorted(unknown)}; name "
                f"one for each sequence"
            )
        limit, rows = max_positions(causal_lm(self.model).config), vocabulary_rows(self.model)
        for episode in episodes:
            least, most = min(episode.teacher_ids), max(episode.teacher_ids)
            if not 0 <= least <= most < rows:
                raise InputError(
                    f"token ids must be the model's, from 0 to {rows - 1}, got {least} to {most}; "
                    f"give pads by masks, and use the model's own tokenizer"
                )
            prefix, own = len(self._prefix_ids[episode.context]), len(episode.teacher_ids)
            if limit is not None and prefix + own > limit:
                raise InputError(
                    f"context, prompt and completion must fit the teacher's {limit} positions, got "
                    f"{prefix} tokens of context and {own} behind it; shorten the context or the "
                    f"completions"
                )


def _completed(
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
    contexts: Sequence[str] | None,
) -> list[Episode]:
    """Completions behind the teacher's prompts; what a student sees is not asked."""
    for what, sequences in (("prompt", prompt_ids), ("completion", completion_ids)):
        if not all(map(len, sequences)):
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
    parts = zip(prompt_ids, completion_ids, names, strict=True)
    return [
        Episode.of_completion(Prompt([*prompt], [*prompt], name), completion)
        for prompt, completion, name in parts
    ]


def teacher_of(
    model: torch.nn.Module,
    prefixes: Mapping[str, Sequence[int]],  # by the name of the context
    config: TrainConfig,
    frozen: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> SharedPrefixTeacher:
    """The teacher of a run, within the memory that its configuration gives."""
    return SharedPrefixTeacher(
        model,
        prefixes,
        config.max_tokens_per_pass,
        frozen=frozen,
        prefix_cache_bytes=config.prefix_cache_mib * 2**20,
    )


def _check_prefixes(model: torch.nn.Module, prefixes: Mapping[str, Sequence[int]]) -> None:
    lm = causal_lm(model)
    limit, rows = max_positions(lm.config), vocabulary_rows(lm)
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


@lru_cache
def _warn_once(text: str) -> None:
    """A scorecard behind a run makes a second teacher of the same model."""
    log.warning(text)
