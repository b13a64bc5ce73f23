"""The head is measured, whatever the configuration calls its parts."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from opcd.errors import InputError
from opcd.models.head import head_of
from opcd.models.lm import evaluating
from opcd_kernels import reference
from tests.conftest import tiny_llama
from tests.opcd.architectures import ARCHITECTURES, build


def llama_with(change: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A Llama whose logits are changed behind the head."""
    model = tiny_llama(**settings).to(dtype)
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "settings", "scale", "softcap"),
    [
        (lambda x: x, {}, 1.0, None),
        (lambda x: x * 0.25, {"my_multiplier": 0.25}, 0.25, None),
        (lambda x: x / 0.25, {"my_divisor": 0.25}, 4.0, None),
        (lambda x: 7.5 * torch.tanh(x / 7.5), {"a_cap": 7.5}, 1.0, 7.5),
        (lambda x: 30 * torch.tanh(x / 4 / 30), {"a_cap": 30.0, "divisor": 4.0}, 0.25, 30.0),
    ],
)
def test_scales_and_caps_by_any_name(
    change: Any, settings: dict, scale: float, softcap: float | None, dtype: torch.dtype
) -> None:
    head = head_of(llama_with(change, dtype, **settings))
    assert (head.scale, head.softcap) == (scale, softcap)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x * 0.37, "no scale and no cap"),  # a number that the configuration lacks
        (lambda x: x.clamp(-2, 2), "no scale and no cap"),
        (lambda x: x + torch.arange(x.shape[-1]), "no scale and no cap"),
    ],
)
def test_other_changes_are_refused(change: Any, reason: str) -> None:
    with pytest.raises(InputError, match=f"{reason}.*not supported"):
        head_of(llama_with(change))


def test_a_head_that_is_more_than_its_weight_is_refused() -> None:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda *x: x[-1] * 1.1)
    with pytest.raises(InputError, match="not a product with its weight"):
        head_of(model)
    between = tiny_llama()
    between.lm_head.register_forward_pre_hook(lambda _, x: (x[0].flip(-1),))
    with pytest.raises(InputError, match="not the body's hidden states, scaled"):
        head_of(between)


def test_an_adapter_on_the_head_is_refused_where_it_is_on() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    model = get_peft_model(tiny_llama(), lora)
    with pytest.raises(InputError, match=r"got an adapter on it.*modules_to_save"):
        head_of(model)
    with model.disable_adapter():
        assert head_of(model).weight is model.base_model.model.lm_head.base_layer.weight
    whole = get_peft_model(
        tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    trained = whole.base_model.model.lm_head
    assert head_of(whole).weight is trained.modules_to_save["default"].weight
    with whole.disable_adapter():
        assert head_of(whole).weight is trained.original_module.weight


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_measured_head_gives_the_models_logits(name: str) -> None:
    model = build(name)
    ids = torch.tensor([[5, 9, 200, 31]])
    head = head_of(model)
    hidden: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda *x: hidden.append(x[-1][0]))
    expected = model(input_ids=ids, use_cache=False).logits[0]
    hook.remove()
    found = reference.logits(hidden[0][0] * head.scale, head.weight, head.bias, head.softcap)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_a_renewed_head_is_taken_as_it_is() -> None:
    model = tiny_llama()
    head_of(model)
    model.lm_head = torch.nn.Linear(32, 300, bias=True)
    head = head_of(model)
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias


def test_modes_come_back() -> None:
    model = tiny_llama().train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
