"""Memory for keys and values: by hand, and by a server's metrics."""

from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen3Config

from opcd.evaluation.server import Server
from opcd.serving.room import Blocks, blocks_in, blocks_of, bytes_per_token, room
from tests.opcd.serving.fake_server import Behaviour

SMOLLM2: dict[str, Any] = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
}


def test_bytes_of_a_token() -> None:
    assert bytes_per_token(LlamaConfig(**SMOLLM2), 2) == 2 * 30 * 3 * 64 * 2
    wide = LlamaConfig(**SMOLLM2 | {"head_dim": 128, "num_key_value_heads": None})
    assert bytes_per_token(wide, 4) == 2 * 30 * 9 * 128 * 4
    assert bytes_per_token(Qwen3Config(use_sliding_window=False), 2) is not None


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(sliding_window=4096),
        LlamaConfig(**SMOLLM2, kv_lora_rank=512),
        LlamaConfig(**SMOLLM2, layer_types=["full_attention", "linear_attention"] * 15),
        LlamaConfig(**SMOLLM2, state_size=16),
    ],
)
def test_models_that_keep_something_else_have_no_figure(config: Any) -> None:
    assert bytes_per_token(config, 2) is None


def test_a_request_takes_whole_blocks_behind_those_it_shares() -> None:
    blocks = Blocks(tokens=128, number=700)
    whole = room(728, 0, 2, blocks, 23_040)
    assert (whole.own_tokens, whole.shared_tokens, whole.fits) == (768, 0, 116)
    assert whole.own_mib == pytest.approx(768 * 23_040 / 2**20)
    shared = room(728, 640, 2, blocks, 23_040)
    assert (shared.own_tokens, shared.shared_tokens, shared.fits) == (128, 640, 695)
    assert room(728, 640, 2, Blocks(128, 4), 23_040).fits == 0, "and none less"
    alone = room(45, None, 2, None, None)
    assert (alone.own_tokens, alone.fits, alone.own_mib) == (47, None, None)


def test_blocks_are_read_from_metrics(served: Server, behaviour: Behaviour) -> None:
    assert blocks_of(served) == Blocks(8, 100)
    for text in ("", "# nothing", 'vllm:cache_config_info{block_size="8",num_gpu_blocks="None"} 1'):
        assert blocks_in(text) is None
    for size in ("\u00b2", "9" * 5000, "-8"):
        assert (
            blocks_in(f'vllm:cache_config_info{{block_size="{size}",num_gpu_blocks="1"}} 1') is None
        )
    behaviour.metrics = None
    assert blocks_of(served) is None
    assert blocks_of(Server(served.base_url + "/")) is None
