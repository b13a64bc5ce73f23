"""Weights cast once a step: bit for bit what autocast does in every pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from opcd.models.cast_weights import CastWeights
from opcd.models.lm import autocast
from opcd.rollouts.decode import Decoder
from opcd.rollouts.protocol import SamplingParams
from tests.conftest import tiny_llama

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def tiny(lora: bool) -> torch.nn.Module:
    model = tiny_llama(tie_word_embeddings=True)
    if not lora:
        return model
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model.bfloat16(), config)


@pytest.mark.parametrize("lora", [False, True])
def test_values_and_gradients_are_those_of_autocast(lora: bool) -> None:
    found = []
    for cast in (False, True):
        model = tiny(lora)
        if not lora:
            model.requires_grad_(True)
        casts = CastWeights(model, torch.bfloat16)

        def loss(model: torch.nn.Module = model, cast: bool = cast) -> torch.Tensor:
            if cast and not lora:
                weight = model.model.layers[0].mlp.up_proj.weight
                assert weight.dtype == torch.bfloat16, "not the casts"
            return model(input_ids=IDS).logits.float().square().sum()

        with autocast(CPU, torch.bfloat16):
            value = casts.run(loss) if cast else loss()
        value.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert {g.dtype for g in grads} == {torch.float32}
        found.append((value, grads))
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][1]) == len(found[1][1]) > 5
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)


def test_the_head_is_cast_where_it_is_asked_for_and_a_tied_embedding_is_not() -> None:
    model = tiny(lora=False)
    casts = CastWeights(model, torch.bfloat16)
    seen = {}

    def look() -> None:
        seen["head"] = model.lm_head.weight.dtype
        seen["embedding"] = model.model.embed_tokens.weight.dtype
        seen["linear"] = model.model.layers[0].mlp.up_proj.weight.dtype

    for head in (False, True):
        casts.run(look, head)
        assert seen["head"] == (torch.bfloat16 if head else torch.float32)
        assert seen["embedding"] == torch.float32
        assert seen["linear"] == torch.bfloat16
    look()
    assert set(seen.values()) == {torch.float32}, "the weights must be back"


def test_casts_follow_the_weights_when_told() -> None:
    model = tiny(lora=False)
    casts = CastWeights(model, torch.bfloat16)

    def weight() -> torch.Tensor:
        return model.model.layers[0].mlp.up_proj.weight

    with torch.no_grad():
        first = casts.run(weight)
        before = first.clone()
        weight().mul_(2)
        assert torch.equal(casts.run(weight), before)
        casts.outdated()
        assert torch.equal(casts.run(weight), 2 * before)
        assert casts.run(weight).data_ptr() == first.data_ptr(), "a graph reads where they were"


def test_a_decoder_sees_the_casts() -> None:
    """Bit for bit what it computes under autocast alone."""
    model = tiny(lora=False)
    casts = CastWeights(model, torch.bfloat16)

    def logits() -> torch.Tensor:
        decoder = Decoder(model, 2, 64, [1])
        decoder.load([[5, 6], [7, 8, 9]], None, SamplingParams(4, 0.0), torch.arange(2))
        return decoder.step_logits()

    found = []
    for run in (logits, lambda: casts.run(logits, head=True)) * 2:
        with torch.no_grad(), autocast(CPU, torch.bfloat16):
            found.append(run())
            if len(found) == 2:
                model.model.layers[0].mlp.up_proj.weight.mul_(3)  # nobody tells them
    plain, cast, changed, stale = found
    assert torch.equal(plain, cast)
    assert torch.equal(stale, cast)
    assert not torch.equal(changed, plain)
