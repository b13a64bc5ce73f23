"""Completions that grow by one token a step, all rows at once, on memory that never moves.

A step is a packed pass (`packed.py`) over one token of each row. What it reads and writes (tokens,
positions, keys and values) lies in tensors made once, nothing in it waits for the device, and the
token is drawn inside. So a CUDA graph can record one step and replay it: one launch a token instead
of one for every small kernel of every layer, which is what plain decoding on a GPU spends its time
on. Elsewhere the same step simply runs.
"""

import contextlib
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.models.lm import causal_lm, rope_differs
from opcd.passes.attention import Shape, cached_attention
from opcd.passes.packed import Behind, packed_attention, packed_pass
from opcd.passes.packing import Packing
from opcd.passes.prefix import SharedPrefix
from opcd.rollouts.capture import Recording, recorded
from opcd.rollouts.histories import Branch, branches
from opcd.rollouts.noise import drawn, truncated, uniforms
from opcd.rollouts.protocol import SamplingParams
from opcd.rollouts.stops import StopStrings
from opcd.runtime.batches import pieces_by_tokens
from opcd.runtime.upload import uploaded

# Steps of a graph between two looks at whether all rows have finished: a look waits for the GPU.
STEPS_BETWEEN_LOOKS = 8
SPARE_SLOTS = 8  # of a row: as many as leave masks and keys aligned
LENGTH_STEP = 64  # rows hold a multiple of so many tokens, so that few sizes come up


class StaticCache:
    """Keys and values of B rows of W slots, T and some more; a token's is `first(row)` + position.

    Those behind T are never written: zeros, the last of which attention takes for sinks.
    """

    def __init__(self, rows: int, length: int, dtype: torch.dtype) -> None:
        self.rows = rows
        self.length = length
        self.width = length + SPARE_SLOTS
        self._dtype = dtype
        self._layers: dict[int, list[Tensor]] = {}  # (B · W, H_kv, D) and (B · W, H_kv, D_v)

    def first(self, row: int) -> int:
        """The slot of a row's first token."""
        return row * self.width

    def write(
        self,
        layer: int,
        slots: Tensor,  # (N,), no two the same
        key: Tensor,  # (N, H_kv, D)
        value: Tensor,  # (N, H_kv, D_v)
    ) -> None:
        """Put tokens into their slots. The first call for a layer makes its memory."""
        if layer not in self._layers:
            shapes = [(self.rows * self.width, *x.shape[1:]) for x in (key, value)]
            self._layers[layer] = [key.new_zeros(s, dtype=self._dtype) for s in shapes]
        for held, new in zip(self._layers[layer], (key, value), strict=True):
            held.index_copy_(0, slots, new.to(self._dtype))

    def clear(self) -> None:
        """Zeros everywhere: a value that is hidden still counts 0 times, and 0 · NaN is NaN."""
        for held in chain.from_iterable(self._layers.values()):
            held.zero_()

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """(B, H_kv, W, D) and (B, H_kv, W, D_v), views."""
        keys, values = (
            x.unflatten(0, (self.rows, self.width)).transpose(1, 2) for x in self._layers[layer]
        )
        return keys, values

    def adopt(self, other: "StaticCache") -> None:
        """Take what a shorter one holds; each token keeps its row and its position."""
        self.clear()
        for layer, held in other._layers.items():
            if layer not in self._layers:
                shapes = [(self.rows * self.width, *x.shape[1:]) for x in held]
                self._layers[layer] = [x.new_zeros(s) for x, s in zip(held, shapes, strict=True)]
            for mine, theirs in zip(self._layers[layer], held, strict=True):
                rows = mine.unflatten(0, (self.rows, self.width))
                rows[:, : other.width] = theirs.unflatten(0, (other.rows, other.width))


class _CachedRow(NamedTuple):
    """The first tokens of one row, as what further ones stand behind."""

    cache: StaticCache
    row: int
    length: int

    def __len__(self) -> int:
        return self.length

    def keys_values(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        keys, values = (x[self.row, :, : self.length] for x in self.cache.read(layer))
        return keys.to(dtype), values.to(dtype)


class _Piece(NamedTuple):
    """Tokens that are computed once, and the rows that hold the first ones of them."""

    token_ids: Sequence[int]
    first: int  # the position of the first
    rows: Sequence[tuple[int, int]]  # a row, and how many it holds

    def cut(self, begin: int, end: int) -> "_Piece":
        rows = [(row, min(held, end) - begin) for row, held in self.rows if held > begin]
        return _Piece(self.token_ids[begin:end], self.first + begin, rows)


class _StepPass:
    """One new token of each row, behind what the cache holds of it."""

    def __init__(self, cache: StaticCache, position: Tensor) -> None:
        device = position.device
        self._cache = cache
        self._slots = torch.arange(cache.rows, device=device) * cache.width + position  # (B,)
        self._distance = position[:, None] - torch.arange(cache.width, device=device)  # (B, W)
        self._visible: dict[int | None, Tensor] = {}  # (B, W), by window

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        self._cache.write(layer, self._slots, key, value)
        if shape.window not in self._visible:
            visible = self._distance >= 0
            if shape.window is not None:
                visible = visible & (self._distance < shape.window)
            self._visible[shape.window] = visible
        keys, values = self._cache.read(layer)
        return cached_attention(query, keys, values, self._visible[shape.window], shape)


class Decoder:
    """Memory for B rows of at most T tokens, and the step that appends a token to each.

    What is put into rows is computed at most `max_tokens_per_pass` tokens at a time. Arithmetic is
    that of the autocast context in which it is made, and must be used.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: int,
        length: int,
        eos_token_ids: Sequence[int],
        max_tokens_per_pass: int = 4096,
        truncates: bool = False,  # whether it can draw from the likeliest tokens alone: a sort more
    ) -> None:
        lm = causal_lm(model)
        self._max_tokens_per_pass = max_tokens_per_pass
        self.rows = rows
        self.length = length
        self.truncates = truncates
        self._model = model
        self._device = device = lm.device
        low = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if low else lm.dtype
        self._cache = StaticCache(rows, length, dtype)
        self._eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
        # Rows of prompt and completion. A finished row writes behind its end: one column more.
        self._tokens = torch.zeros(rows, length + 1, dtype=torch.long, device=device)
        # Of each row's newest token, the next to be computed; and of the last that it may get.
        self._position = torch.zeros(rows, dtype=torch.long, device=device)
        self._last = torch.zeros_like(self._position)
        self._live = torch.zeros(rows, dtype=torch.bool, device=device)
        self._temperature = torch.zeros((), device=device)
        self._top_k = torch.zeros((), dtype=torch.long, device=device)
        self._top_p = torch.ones((), dtype=torch.float64, device=device)
        self._streams = torch.zeros_like(self._position)
        self._first = torch.zeros_like(self._position)  # where the completion's first token goes
        self._recorded: Recording | None = None

    def load(
        self,
        prompts: Sequence[Sequence[int]],  # at most B
        prefix: SharedPrefix | None,  # what they all start with
        params: SamplingParams,
        streams: Tensor,  # (B,) int64, on the CPU: what each row draws by
    ) -> None:
        """Start a row for each prompt. What several begin with is computed once."""
        longest = max(map(len, prompts)) + params.max_completion_tokens
        assert longest <= self.length, "a row that does not fit"
        self.place(prompts, prefix)
        self.start(range(len(prompts)), params, streams)

    def place(self, prompts: Sequence[Sequence[int]], prefix: SharedPrefix | None) -> None:
        """Put prompts, at most B, into the rows in place of whatever stands there."""
        tokens = torch.zeros(self._tokens.shape, dtype=torch.long)
        position = torch.zeros(self.rows, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
            position[row] = len(prompt) - 1
        self._tokens.copy_(tokens)
        self._position.copy_(position)
        self._cache.clear()
        self._fill_cache(prompts, prefix)

    def start(
        self,
        rows: Sequence[int],  # that get a completion; the others stand still
        params: SamplingParams,
        streams: Tensor,  # (len(rows),) int64, on the CPU
    ) -> None:
        """Let rows be completed, each behind its newest token, up to T tokens at most."""
        assert self.truncates or not params.truncates, "a decoder that draws from all tokens"
        of = torch.tensor(list(rows), dtype=torch.long)
        numbers = torch.zeros(self.rows, dtype=torch.long).index_copy(0, of, streams)
        live = torch.zeros(self.rows, dtype=torch.bool).index_fill(0, of, True)
        self._live.copy_(live)
        self._last.copy_(self._position + params.max_completion_tokens * self._live)
        self._temperature.fill_(params.temperature)
        self._top_k.fill_(params.top_k)
        self._top_p.fill_(params.top_p)
        self._streams.copy_(numbers)
        self._first.copy_(self._position + 1)

    def extend(
        self,
        tokens: Mapping[int, Sequence[int]],  # by row: all that it holds
        new: Mapping[int, Sequence[int]],  # by row: what is put behind that, at least one
    ) -> None:
        """Put tokens behind rows; all but the last of each are computed.

        The newest token of a row is computed with what follows it, so that a row may also end
        earlier than it did: what it held behind is written over.
        """
        rows = sorted(new)
        pieces = []
        for row in rows:
            ids = [tokens[row][-1], *new[row][:-1]]
            pieces.append(_Piece(ids, len(tokens[row]) - 1, [(row, len(ids))]))
        self._compute(pieces, None)
        held = self._tokens.cpu()
        position = self._position.cpu()
        for row in rows:
            sequence = [*tokens[row], *new[row]]
            held[row, : len(sequence)] = torch.tensor(sequence)
            position[row] = len(sequence) - 1
        self._tokens.copy_(held)
        self._position.copy_(position)

    def adopt(self, other: "Decoder") -> None:
        """Take the rows of a shorter one."""
        self._cache.adopt(other._cache)
        self._tokens.zero_()
        self._tokens[:, : other.length + 1] = other._tokens
        self._position.copy_(other._position)
        self._live.zero_()

    def _fill_cache(self, prompts: Sequence[Sequence[int]], prefix: SharedPrefix | None) -> None:
        """Keys and values of every prompt but its last token, which the first step computes.

        Equal prompts, and the history that several begin with, are computed once.
        """
        start = len(prefix) if prefix is not None else 0
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            rows_of.setdefault(tuple(prompt[:-1]), []).append(row)
        if prefix is not None:
            self._copy_prefix(prefix, len(prompts))
        sequences = sorted(rows_of, key=len, reverse=True)
        trunk_rows: dict[int, list[tuple[int, int]]] = {}
        rests: list[_Piece] = []
        whole = self._rope_changes(max(map(len, prompts)))
        each = [Branch(i, len(sequence)) for i, sequence in enumerate(sequences)]
        for i, branch in enumerate(each if whole else branches(sequences, start)):
            rows = rows_of[sequences[i]]
            held = trunk_rows.setdefault(branch.trunk, [])
            held.extend((row, branch.length - start) for row in rows)
            if rest := sequences[i][branch.length :]:
                rests.append(_Piece(rest, branch.length, [(row, len(rest)) for row in rows]))
        trunks = [_Piece(sequences[i][start:], start, held) for i, held in trunk_rows.items()]
        self._compute(trunks, prefix, whole)
        self._compute(rests, prefix)

    def _rope_changes(self, longest: int) -> bool:
        """Whether the first tokens of a sequence alone are given other rotary frequencies."""
        return rope_differs(causal_lm(self._model).config, 1, longest)

    def _compute(
        self, new: Sequence[_Piece], prefix: SharedPrefix | None, whole: bool = False
    ) -> None:
        """Put keys and values of new tokens into the cache, which holds what they stand behind.

        Tokens right behind the prefix (of none: the first of a row) attend it in place, together;
        others attend what the cache holds of their row.
        """
        start = len(prefix) if prefix is not None else 0
        lengths = [len(x.token_ids) for x in new]
        most = max([self._max_tokens_per_pass, *(lengths if whole else ())])
        for pieces in pieces_by_tokens(lengths, most, whole):
            parts = [new[i].cut(begin, end) for i, begin, end in pieces]
            parts.sort(key=lambda x: -len(x.token_ids))
            fresh = [x for x in parts if x.first == start]
            later = [x for x in parts if x.first != start]
            groups = [fresh] if fresh else []
            behind: list[Behind] = [prefix] if fresh else []
            groups += [[x] for x in later]
            behind += [_CachedRow(self._cache, x.rows[0][0], x.first) for x in later]
            self._one_pass(groups, behind)

    def _one_pass(self, groups: Sequence[Sequence[_Piece]], behind: Sequence[Behind]) -> None:
        slots: list[int] = []
        source: list[int] = []  # the place in the packed row of what goes into a slot
        packed: list[int] = []
        for part in chain.from_iterable(groups):
            for row, count in part.rows:
                first = self._cache.first(row) + part.first
                slots += range(first, first + count)
                source += range(len(packed), len(packed) + count)
            packed += part.token_ids
        to, of, ids = (uploaded(torch.tensor(x), self._device) for x in (slots, source, packed))

        def store(layer: int, key: Tensor, value: Tensor) -> None:
            self._cache.write(layer, to, key[of], value[of])

        packing = Packing([[len(x.token_ids) for x in group] for group in groups], self._device)
        packed_pass(self._model, ids[None], packing, behind, store)

    def _copy_prefix(self, prefix: SharedPrefix, rows: int) -> None:
        first = torch.arange(rows, device=self._device)[:, None] * self._cache.width + len(prefix)
        for layer in prefix.attention_layers:
            key, value = prefix.keys_values(layer)  # (H_kv, S, D), the last S that the layer sees
            kept = torch.arange(-key.shape[1], 0, device=self._device)
            key, value = (x.transpose(0, 1).repeat(rows, 1, 1) for x in (key, value))
            self._cache.write(layer, (first + kept).flatten(), key, value)

    def step(self) -> Tensor:  # (B, V), fp32: what the appended tokens were drawn from
        """Append a token to every row that is not finished. Call it inside `packed_attention`."""
        output = causal_lm(self._model)(
            input_ids=self._tokens.gather(1, self._position[:, None]).T,  # (1, B)
            position_ids=self._position[None],
            use_cache=False,
            packed_pass=_StepPass(self._cache, self._position),
        )
        logits = output.logits[0].float()
        greedy = self._temperature == 0
        temperature = self._temperature.masked_fill(greedy, 1.0)
        uniform = uniforms(self._streams, self._position + 1 - self._first)
        head = logits
        if self.truncates:
            head = truncated(logits, temperature, self._top_k, self._top_p)
        token = drawn(head, uniform, temperature)
        token = torch.where(greedy, logits.argmax(-1), token)
        self._tokens.scatter_(1, self._position[:, None] + 1, token[:, None])
        self._position += self._live
        ends = (token[:, None] == self._eos).any(-1) | (self._position >= self._last)
        self._live &= ~ends
        return logits

    def capture(self) -> None:
        """Record the step in a CUDA graph, which `run` replays from now on; see `recorded` for
        what it raises. Plain steps still do where CUDA refuses."""
        with packed_attention(self._model):
            name = type(causal_lm(self._model)).__name__
            self._recorded = recorded(self.step, self._device, name)

    def run(self, params: SamplingParams) -> None:
        """Complete the rows. One that comes to a stop string between two looks goes on up to the
        next: what is behind it is for the caller to cut."""
        held = self._recorded
        looks = 1 if held is None else STEPS_BETWEEN_LOOKS
        advance = self.step if held is None else held.graph.replay
        with packed_attention(self._model) if held is None else contextlib.nullcontext():
            for done in range(1, params.max_completion_tokens + 1):
                advance()
                if done % looks == 0:
                    if params.stop is not None:
                        self._end_at(params.stop)
                    if not self._live.any():
                        return

    def _end_at(self, stop: StopStrings) -> None:
        """End the rows that have come to a stop string."""
        live, firsts = self._live.tolist(), self._first.tolist()
        for row, sequence in enumerate(self.sequences()):
            if live[row] and stop.reached(sequence[firsts[row] :]):
                live[row] = False
        self._live.copy_(torch.tensor(live))

    def cut(self, lengths: Mapping[int, int]) -> None:
        """Let rows end with so many tokens; what they hold behind is written over."""
        position = self._position.cpu()
        for row, length in lengths.items():
            position[row] = length - 1
        self._position.copy_(position)

    def step_logits(self) -> Tensor:  # (B, V), fp32
        """One step, as `run` does it; the logits hold until the next one."""
        if self._recorded is None:
            with packed_attention(self._model):
                return self.step()
        self._recorded.graph.replay()
        return self._recorded.result

    def sequences(self) -> list[list[int]]:
        """Prompt and completion of each row so far."""
        ends = (self._position + 1).tolist()
        return [row[:end] for row, end in zip(self._tokens.tolist(), ends, strict=True)]


def rounded_length(length: int) -> int:
    """What rows of so many tokens are given room for."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def uncached_autocast(device: torch.device) -> torch.autocast:
    """The autocast around it, keeping no casts: in a graph they would go stale."""
    kind = device.type
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )
