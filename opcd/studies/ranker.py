"""LLMLingua's compressor (Jiang et al., 2023), driven by a model that is loaded already.

Its own constructor fetches a tokenizer, and a model by name; and it takes keys and values apart as
pairs, which those of transformers 5 no longer are beyond one pass (some 400 tokens).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from llmlingua import PromptCompressor
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from opcd.models.lm import max_positions

Pair = Sequence[Tensor]  # keys and values of a layer
ANY = 2**31  # positions of a model that has no limit


class Ranker(PromptCompressor):
    """Ranks tokens by what a causal LM makes of them, in fp32."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, model.device
        self.oai_tokenizer = tokenizer  # counts tokens, of which we measure our own
        self.max_position_embeddings = max_positions(model.config) or ANY
        self.use_llmlingua2 = False
        self.cache_bos_num, self.prefix_bos_num = 10, 100
        self.context_idxs: list[list[int]] = []

    def get_ppl(
        self,
        *arguments: Any,
        past_key_values: Sequence[Pair] | None = None,
        return_kv: bool = False,
        **named: Any,
    ) -> Any:
        """As the base class has it, with keys and values as pairs on the way in and out."""
        cache = None
        if past_key_values is not None:
            cache = _Pairs()
            for layer, (keys, values) in enumerate(past_key_values):
                cache.update(keys, values, layer)
        loss, found = super().get_ppl(*arguments, past_key_values=cache, return_kv=True, **named)
        return (loss, [(x.keys, x.values) for x in found.layers]) if return_kv else loss


class _Pairs(DynamicCache):
    """Keys and values that are also what they were before transformers 5: pairs by layer."""

    def __iter__(self) -> Iterator[Pair]:
        return iter([(layer.keys, layer.values) for layer in self.layers])

    def __getitem__(self, layer: int) -> Pair:
        return self.layers[layer].keys, self.layers[layer].values
