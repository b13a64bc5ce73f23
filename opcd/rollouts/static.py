"""Rollouts from a static cache: the step of `decode.py`, for lists of prompts."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from opcd.models.lm import causal_lm, eos_token_ids, vocabulary_rows
from opcd.models.sdpa import without_cudnn_attention
from opcd.passes.plan import Plan
from opcd.passes.prefix import UnsupportedModelError, common_prefix
from opcd.passes.staleness import adapter_state
from opcd.rollouts.capture import GraphError
from opcd.rollouts.conversations import Batches, GrowingRows
from opcd.rollouts.decode import LENGTH_STEP, Decoder, rounded_length, uncached_autocast
from opcd.rollouts.fitting import BatchSize
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.histories import batches_by_history
from opcd.rollouts.protocol import Conversations, Rollout, SamplingParams, stream_tensor
from opcd.rollouts.static_conversations import StaticBatches

log = logging.getLogger(__name__)


class StaticEngine:
    """Decodes on the trained module itself, on a GPU by replaying a CUDA graph.

    Weights are never stale: the graph reads them where the optimizer writes them, and whatever else
    it holds fast is compared in every call (where each tensor lies, adapters, training mode). Under
    autocast fp32 weights are cast in every step, unless `CastWeights` stand in their places.

    Between calls the engine keeps its decoder: the largest number of rows and tokens asked for, as
    keys and values; `close` frees them. Where memory runs out it samples fewer sequences at once,
    and where not even one fits, or CUDA refuses a graph, transformers.generate takes over for good;
    either is said once.
    """

    def __init__(
        self, model: torch.nn.Module, batch_size: int = 32, max_tokens_per_pass: int = 4096
    ) -> None:
        self.name = "static"
        self._model = model
        self._batch = BatchSize(batch_size)
        self._max_tokens_per_pass = max_tokens_per_pass
        self._instead: TransformersEngine | None = None
        self._eos = eos_token_ids(model)
        self._graphed = causal_lm(model).device.type == "cuda"
        self._version = 0
        self._decoder: Decoder | None = None
        self._fixed: Any = None  # what the decoder was made for

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        streams: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """See RolloutEngine.generate."""
        numbers = stream_tensor(streams, prompts, params)
        if not prompts:
            return []
        if self._instead is None:
            try:
                return self._batch.fitting(
                    lambda: self._generated(prompts, params, numbers),
                    lambda size: min(size, len(prompts)),
                )
            except (torch.OutOfMemoryError, GraphError) as error:
                reason = str(error).splitlines()[0]
            self._give_way(reason)
        assert self._instead is not None
        return self._instead.generate(prompts, params, numbers.tolist())

    def _generated(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, numbers: Tensor
    ) -> list[Rollout]:
        longest = max(map(len, prompts)) + params.max_completion_tokens
        sequences: dict[int, list[int]] = {}
        size = self._batch.size
        self._free_if_larger(size)
        with uncached_autocast(causal_lm(self._model).device):
            prefix = common_prefix(self._model, prompts)
            most = min(size, len(prompts))
            shared = len(prefix) if prefix is not None else 0
            for batch in batches_by_history(prompts, shared, size):
                rows = most if self._graphed else len(batch)  # idle ones cost a CPU as much
                decoder = self._decoder_for(rows, longest, params.truncates)
                decoder.load([prompts[i] for i in batch], prefix, params, numbers[batch])
                decoder.run(params)
                sequences.update(zip(batch, decoder.sequences(), strict=False))
        rollouts = []
        for i, prompt in enumerate(prompts):
            ids, reason = params.finished(sequences[i][len(prompt) :], self._eos)
            rollouts.append(Rollout(list(prompt), ids, reason, self._version))
        return rollouts

    @torch.no_grad()
    def open(self, prompts: Sequence[Sequence[int]]) -> Conversations:
        """See RolloutEngine.open. Memory of its own is held until they are closed."""
        if self._instead is not None:
            return self._instead.open(prompts)

        def instead(reason: str) -> tuple[BatchSize, Batches]:
            return self._give_way(reason).growing(prompts)

        kind = StaticBatches(self._model, prompts, self._max_tokens_per_pass, self._graphed)
        return GrowingRows(self._model, prompts, self._version, self._batch, kind, instead)

    def sync(self, student: torch.nn.Module, version: int) -> None:
        """The weights are shared: only the version changes."""
        assert student is self._model, "this engine samples from the module that is trained"
        self._version = version
        if self._instead is not None:
            self._instead.sync(student, version)

    def close(self) -> None:
        """Free the graph, keys and values; the next call makes them anew."""
        self._decoder = None

    def _give_way(self, reason: str) -> TransformersEngine:
        """Let transformers.generate make the rollouts from now on."""
        if self._instead is not None:  # conversations were open meanwhile
            return self._instead
        log.warning(
            "rollouts use transformers.generate from now on, not a static cache: %s", reason
        )
        self.close()
        self._instead = TransformersEngine(
            self._model, self._batch.size, max_tokens_per_pass=self._max_tokens_per_pass
        )
        self._instead.sync(self._model, self._version)
        self.name = self._instead.name
        return self._instead

    def _free_if_larger(self, rows: int) -> None:
        """A decoder of more rows than memory has held since is not kept for fewer."""
        if self._decoder is not None and self._decoder.rows > rows:
            self._decoder = None

    def _decoder_for(self, rows: int, longest: int, truncates: bool) -> Decoder:
        """The decoder of the call before, if it fits."""
        length = rounded_length(longest)
        fixed, held = _what_a_graph_holds_fast(self._model), self._decoder
        if held is not None and fixed == self._fixed and truncates == held.truncates:
            if self._graphed:  # idle rows cost a graph little, a new graph costs a second
                rows, length = max(rows, held.rows), max(length, held.length)
            if (held.rows, held.length) == (rows, length):
                return held
        self._decoder = held = None  # its memory, before as much is asked for again
        decoder = Decoder(
            self._model, rows, length, self._eos, self._max_tokens_per_pass, truncates
        )
        if self._graphed:
            decoder.capture()
        self._decoder, self._fixed = decoder, fixed
        return decoder


@torch.no_grad()
def why_not_static(model: torch.nn.Module, plan: Plan) -> str | None:
    """Why `StaticEngine` cannot sample from this model; None if it can.

    Two short sequences are decoded as the engine does it, on a GPU through a graph, in the autocast
    context of the call; every step's distribution is compared with that of full passes.
    """
    if not plan.packed:
        return f"it needs packed passes, and sequences are {plan.mode}: {plan.reason}"
    device = causal_lm(model).device
    with uncached_autocast(device):
        try:
            gap = _gap_to_full_passes(model)
        except (UnsupportedModelError, RuntimeError) as error:  # or what a capture refuses
            return str(error).splitlines()[0]
        except Exception as error:  # whatever a model's own code says: a run goes on without it
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    exact = causal_lm(model).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    bound = 1e-4 if exact else 0.05
    if gap <= bound:
        return None
    return f"steps differ from full passes by {gap:.2g} nats, more than {bound:g}"


def _gap_to_full_passes(model: torch.nn.Module) -> float:
    """The largest divergence of a decoder's steps from full passes, in nats."""
    lm = causal_lm(model)
    vocabulary = vocabulary_rows(lm)
    tokens = [(7919 * k + 11) % vocabulary for k in range(12)]
    decoder = Decoder(model, 2, LENGTH_STEP, [])
    if lm.device.type == "cuda":
        decoder.capture()
    decoder.load([tokens[:3], tokens[3:]], None, SamplingParams(4), torch.tensor([1, 2]))
    gaps = []
    for _ in range(3):
        before = decoder.sequences()
        found = decoder.step_logits().log_softmax(-1)
        for sequence, row in zip(before, found, strict=True):
            ids = torch.tensor([sequence], device=lm.device)
            with without_cudnn_attention():
                full = lm(input_ids=ids, use_cache=False)
            expected = full.logits[0, -1].float().log_softmax(-1)
            gaps.append((expected.exp() * (expected - row)).sum())
    return torch.stack(gaps).max().item()


def _what_a_graph_holds_fast(model: torch.nn.Module) -> Any:
    """What must not change while a graph of the model is replayed; values of weights may."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    kind = causal_lm(model).device.type
    adapters = [adapter_state(m) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    # Tensors that are made in inference mode cannot be written to outside of it.
    mode = model.training, torch.is_inference_mode_enabled()
    return [t.data_ptr() for t in tensors], adapters, autocast, mode
