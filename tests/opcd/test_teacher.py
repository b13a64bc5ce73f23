"""The teacher behind its shared prefix, against every sequence computed in full and alone."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import RwkvConfig, RwkvForCausalLM

from opcd.errors import InputError
from opcd.lm import head_of
from opcd.objective import check_head, head_divergence
from opcd.prefix import SharedPrefix
from opcd.teacher import SharedPrefixTeacher
from tests.conftest import tiny_llama
from tests.opcd.architectures import ARCHITECTURES, build

PREFIX = torch.randint(2, 258, (40,), generator=torch.Generator().manual_seed(0)).tolist()
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [20, 21]]
COMPLETIONS = [[30, 31, 32, 33], [34, 35], [36], list(range(40, 55))]


@torch.no_grad()
def alone(model: torch.nn.Module) -> torch.Tensor:
    """The definition: each sequence by itself, without cache, batch or padding."""
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([[*PREFIX, *prompt, *completion]])
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        rows.append(hidden[-len(completion) - 1 : -1])
    return torch.cat(rows)


def divergence(model: torch.nn.Module, hidden: torch.Tensor, expected: torch.Tensor) -> float:
    head = head_of(model)
    return head_divergence(hidden, head, expected, head).per_token.max().item()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_equals_each_sequence_alone(name: str) -> None:
    model = build(name)
    check_head(model, PREFIX[:8])
    teacher = SharedPrefixTeacher(model, PREFIX, sequences_per_pass=3)
    scored = teacher.score(PROMPTS, COMPLETIONS)
    expected = alone(model) * head_of(model).scale
    assert teacher.plan.mode == "cached", teacher.plan
    assert scored.cu_seqlens.tolist() == [0, 4, 6, 7, 22]
    assert divergence(model, scored.hidden, expected) < 1e-6
    again = teacher.score(PROMPTS, COMPLETIONS)
    assert torch.equal(again.hidden, scored.hidden), "scoring changed the recorded prefix"


def test_uncached_equals_each_sequence_alone() -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX, shared=False)
    assert teacher.plan.mode == "recompute"
    assert divergence(model, teacher.score(PROMPTS, COMPLETIONS).hidden, alone(model)) < 1e-6


def test_the_prefix_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX)
    lengths = []
    forward = model.model.forward

    def record(*args: object, **kwargs: object) -> object:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", record)
    teacher.score(PROMPTS, COMPLETIONS)
    assert max(lengths) < len(PREFIX)


def test_a_cache_that_lies_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    expand = SharedPrefix.expand

    def broken(self: SharedPrefix, batch_size: int) -> object:
        cache = expand(self, batch_size)
        cache.layers[0].keys = cache.layers[0].keys.roll(1, -2)
        return cache

    monkeypatch.setattr(SharedPrefix, "expand", broken)
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.mode == "recompute"
    assert "computed with every sequence" in caplog.text
    assert divergence(model, teacher.score(PROMPTS, COMPLETIONS).hidden, alone(model)) < 1e-6


def test_an_architecture_without_a_cache_is_computed_in_full() -> None:
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
    )
    model = RwkvForCausalLM(config).eval()
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.mode == "recompute"
    assert not teacher.shares_prefix
    assert divergence(model, teacher.score(PROMPTS, COMPLETIONS).hidden, alone(model)) < 1e-6


def test_the_student_with_its_adapter_off_is_the_teacher() -> None:
    plain = tiny_llama()
    expected = alone(plain)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    student = get_peft_model(copy.deepcopy(plain), lora).eval()
    teacher = SharedPrefixTeacher(student, PREFIX, frozen=student.disable_adapter)
    assert divergence(plain, teacher.score(PROMPTS, COMPLETIONS).hidden, expected) < 1e-6
    on = SharedPrefixTeacher(student, PREFIX).score(PROMPTS, COMPLETIONS)
    assert divergence(plain, on.hidden, expected) > 1e-2


def test_heads_that_the_loss_cannot_use_are_refused() -> None:
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda *x: x[-1] * 1.1)
    with pytest.raises(InputError, match="architecture is not supported"):
        check_head(model, PREFIX)
    with pytest.raises(InputError, match="258 embeddings and token 300"):
        check_head(tiny_llama(), [5, 300])
    check_head(tiny_llama().bfloat16(), PREFIX)


def test_empty_sequences_are_refused() -> None:
    teacher = SharedPrefixTeacher(tiny_llama(), PREFIX)
    with pytest.raises(ValueError, match="every prompt must hold at least one token"):
        teacher.score([[]], [[1]])
    with pytest.raises(ValueError, match="every completion must hold at least one token"):
        teacher.score([[1]], [[]])


def test_bf16_teacher_agrees_within_its_noise() -> None:
    model = tiny_llama().bfloat16()
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.mode == "cached"
    hidden = teacher.score(PROMPTS, COMPLETIONS).hidden
    assert divergence(model, hidden, alone(model)) < 0.05
