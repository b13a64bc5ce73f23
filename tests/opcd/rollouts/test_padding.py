"""Where pads are not neutral, prompts of one length alone are sampled together."""

from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.padding import pads_are_neutral
from opcd.rollouts.protocol import SamplingParams
from tests.conftest import tiny_llama
from tests.opcd.architectures import ARCHITECTURES, build

ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
PROMPTS = [[*range(5, 5 + n), 7, 9] for n in (30, 4, 11, 30)]


def bart() -> BartForCausalLM:
    """Its positions are counted from the pads on."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}
    sizes |= {"decoder_ffn_dim": 64, "max_position_embeddings": 256, "init_std": 0.5}
    return BartForCausalLM(BartConfig(**sizes, **ENDS)).eval()


def gpt_neo() -> GPTNeoForCausalLM:
    """Its window counts slots of the cache, which knows of none."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
    sizes |= {"attention_types": [[["global", "local"], 1]], "window_size": 24}
    sizes |= {"max_position_embeddings": 256, "initializer_range": 0.5}
    return GPTNeoForCausalLM(GPTNeoConfig(**sizes, **ENDS)).eval()


def greedy(model: Any, prompts: list[list[int]], **how: bool) -> list[list[int]]:
    found = TransformersEngine(model, **how).generate(prompts, SamplingParams(6, 0.0))
    return [rollout.completion_token_ids for rollout in found]


def test_models_whose_pads_move_them(caplog: pytest.LogCaptureFixture) -> None:
    model = bart()
    assert not pads_are_neutral(model)
    assert not pads_are_neutral(model)
    (line,) = caplog.messages
    assert line.startswith("prompts of one length alone are sampled together: pads in front move")
    alone = [greedy(model, [prompt])[0] for prompt in PROMPTS]
    assert greedy(model, PROMPTS) == alone


def test_a_window_that_the_cache_does_not_know() -> None:
    model = gpt_neo()
    shared = [[*range(40, 100), *prompt] for prompt in PROMPTS]
    alone = [greedy(model, [prompt], share_prefix=False)[0] for prompt in shared]
    assert greedy(model, shared) == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_models_are_not_refused_for_their_noise(dtype: torch.dtype) -> None:
    for name in ARCHITECTURES:
        assert pads_are_neutral(build(name).to(dtype).eval()), name
    for seed in range(8):
        assert pads_are_neutral(tiny_llama(seed).to(dtype))
