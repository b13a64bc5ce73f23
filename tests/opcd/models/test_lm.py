"""What is read from a model's configuration."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

from opcd.models.by_name import load_model
from opcd.models.lm import cache_argument, cache_of, keep_softcap, max_positions, rope_differs
from tests.opcd.architectures import build


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (None, 256),
        ({"rope_type": "default", "rope_theta": 1e4}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, 1024),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            },
            256,  # named already: 4 x 64
        ),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 256),
        ({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}, 256),
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 5e5,
            },
            256,
        ),
    ],
)
def test_positions_by_scaling(rope: dict[str, Any] | None, expected: int) -> None:
    config = LlamaConfig(max_position_embeddings=256, rope_parameters=rope)
    assert max_positions(config) == expected


def test_positions_as_publishers_write_them() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = Qwen2Config(max_position_embeddings=32768, rope_scaling=scaling)
    assert max_positions(config) == 131_072


def test_scaling_by_kind_of_layer() -> None:
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
    }
    config = Gemma3TextConfig(max_position_embeddings=256, rope_parameters=ropes)
    assert max_positions(config) == 256, "beyond, frequencies are those of a pass's longest row"
    assert rope_differs(config, 100, 300)
    assert not rope_differs(config, 100, 200)


def test_capped_scores_are_not_left_to_sdpa(tmp_path: Path) -> None:
    """transformers 5.20 loads such a model with SDPA, which leaves the cap out."""
    model = build("gemma2-softcap")
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "auto").config._attn_implementation == "eager"
    model.config._attn_implementation = "sdpa"
    keep_softcap(model)
    assert model.config._attn_implementation == "eager"
    other = build("gemma3-interleaved")
    before = other.config._attn_implementation
    keep_softcap(other)
    assert other.config._attn_implementation == before


def test_a_cache_goes_by_the_name_that_a_model_has_for_it() -> None:
    def old(past_key_values: object = None) -> SimpleNamespace:
        return SimpleNamespace(past_key_values=past_key_values)

    def new(cache: object = None, use_cache: bool = True) -> SimpleNamespace:
        return SimpleNamespace(cache=cache)

    for forward in (old, new):
        module = SimpleNamespace(forward=forward)
        assert cache_of(forward(**cache_argument(module, "kept"))) == "kept"
    assert cache_of(SimpleNamespace()) is None


def test_an_installed_model_names_its_cache() -> None:
    model = build("llama").eval()
    output = model(input_ids=torch.tensor([[5, 6]]), use_cache=True)
    assert cache_of(output).get_seq_length() == 2
    again = model(input_ids=torch.tensor([[7]]), **cache_argument(model, cache_of(output)))
    whole = model(input_ids=torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(again.logits[:, -1], whole.logits[:, -1])
