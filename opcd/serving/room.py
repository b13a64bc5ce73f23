"""Memory for keys and values: what a request takes, and how many requests there is room for."""

import re
from math import ceil
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from opcd.errors import InputError
from opcd.evaluation.server import Server

METRIC = "vllm:cache_config_info"
LOOK_S = 10.0
MIB = 1 << 20


class Blocks(NamedTuple):
    """How a server holds keys and values."""

    tokens: int  # in a block
    number: int  # of them


class Room(NamedTuple):
    """Of one contender."""

    own_tokens: int  # that one more request takes, in whole blocks
    shared_tokens: int  # that all requests have in common, kept once
    bytes_per_token: int | None  # None: not by this arithmetic
    fits: int | None  # requests at a time; None where the server does not tell its blocks

    @property
    def own_mib(self) -> float | None:
        """Of one more request."""
        each = self.bytes_per_token
        return None if each is None else self.own_tokens * each / MIB


def blocks_of(server: Server) -> Blocks | None:
    """From a vLLM's metrics, beside its /v1; None where there are none."""
    url = server.base_url.removesuffix("/v1") + "/metrics"
    try:
        with server.opened(url, None, LOOK_S) as response:
            if response.status >= 400:
                return None
            text = b"".join(server.pieces(response, LOOK_S)).decode("utf-8", "replace")
    except InputError:
        return None
    return blocks_in(text)


def blocks_in(metrics: str) -> Blocks | None:
    """What a page of Prometheus' says of the blocks."""
    for line in metrics.splitlines():
        if line.startswith(METRIC + "{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            size, count = labels.get("block_size", ""), labels.get("num_gpu_blocks", "")
            whole = all(re.fullmatch("[0-9]{1,12}", x) for x in (size, count))
            if whole and int(size) and int(count):
                return Blocks(int(size), int(count))
    return None


def room(
    prompt_tokens: float,
    cached_tokens: float | None,
    answer_tokens: float,
    blocks: Blocks | None,
    each_bytes: int | None,
) -> Room:
    """What a request takes in whole blocks, behind those that it shares with the others."""
    size = blocks.tokens if blocks is not None else 1
    shared = int(cached_tokens or 0) // size * size
    own = max(1, ceil((prompt_tokens + answer_tokens - shared) / size)) * size
    fits = None if blocks is None else max(0, blocks.number * size - shared) // own
    return Room(own, shared, each_bytes, fits)


def bytes_per_token(config: PretrainedConfig, element_bytes: int) -> int | None:
    """Keys and values of one token in all layers: 2 · layers · heads · width · bytes of an element.

    heads: of keys and values, which several heads of queries may share. None for models whose
    layers keep something else: a window, a state, a compressed latent.
    """
    text: Any = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    queries = getattr(text, "num_attention_heads", None)
    hidden = getattr(text, "hidden_size", None)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    latent = getattr(text, "kv_lora_rank", None)
    if not (layers and queries and hidden) or kinds != {"full_attention"} or windowed or latent:
        return None
    if getattr(text, "state_size", None) or getattr(text, "ssm_state_size", None):
        return None
    heads = getattr(text, "num_key_value_heads", None) or queries
    width = getattr(text, "head_dim", None) or hidden // queries
    return int(2 * layers * heads * width * element_bytes)
