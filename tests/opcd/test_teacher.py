"""The teacher behind its shared prefix, against every sequence computed in full and alone."""

import copy
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.testing._internal.two_tensor import TwoTensor
from transformers import (
    CpmAntConfig,
    CpmAntForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    ProphetNetConfig,
    ProphetNetForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from opcd.episodes import Episode, Prompt, Span
from opcd.errors import InputError
from opcd.models.head import head_of
from opcd.models.lm import cache_of, rope_differs
from opcd.objective import head_divergence
from opcd.passes.agreement import rounding
from opcd.passes.hidden import completion_rows, scored_hidden
from opcd.passes.packed import packed_pass
from opcd.passes.packing import Packing
from opcd.passes.plan import Plan, planned_hidden
from opcd.passes.prefix import SharedPrefix, UnsupportedModelError
from opcd.passes.prefix_cache import PrefixCache
from opcd.passes.staleness import StalePrefixError, WeightsWatch
from opcd.student_loss import StudentLoss
from opcd.teacher import SharedPrefixTeacher
from tests.conftest import tiny_llama
from tests.opcd.architectures import ARCHITECTURES, COMMON, build

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
def test_scored_hidden_states_equal_each_sequence_alone(name: str) -> None:
    """In one pass and in many, with the results in the order given."""
    model = build(name)
    expected = alone(model) * head_of(model).scale
    for max_tokens in (4096, 24, 1):
        teacher = SharedPrefixTeacher(model, PREFIX, max_tokens)
        scored = teacher.score(PROMPTS, COMPLETIONS)
        assert scored.cu_seqlens.tolist() == [0, 4, 6, 7, 22]
        assert divergence(model, scored.hidden, expected) < 1e-6
        again = teacher.score(PROMPTS, COMPLETIONS)
        assert torch.equal(again.hidden, scored.hidden), "scoring changed the recorded prefix"


def test_uncached_equals_each_sequence_alone() -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX, shared=False)
    assert teacher.plan.mode == "recompute"
    assert divergence(model, teacher.score(PROMPTS, COMPLETIONS).hidden, alone(model)) < 1e-6


@pytest.mark.parametrize("name", ["llama", "mpt-alibi"])
def test_passes_hold_new_tokens_only_and_no_more_than_allowed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    teacher = SharedPrefixTeacher(model, PREFIX, max_tokens_per_pass=18)
    shapes = []
    body = model.base_model
    forward = body.forward

    def record(**kwargs: object) -> object:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(**kwargs)

    monkeypatch.setattr(body, "forward", record)
    teacher.score(PROMPTS, COMPLETIONS)
    # 17, 7, 7 and 3 tokens; the last token of a sequence predicts nothing and is left out.
    between = {"llama": (1, 12), "mpt-alibi": (2, 6)}
    assert shapes == [(1, 16), between[name], (1, 2)]


def test_attention_is_switched_for_the_pass_alone() -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.mode == "packed"
    seen = []
    handle = model.model.layers[1].register_forward_hook(
        lambda *_: seen.append(model.config._attn_implementation)
    )
    teacher.score(PROMPTS, COMPLETIONS)
    assert seen == ["opcd_packed"]
    assert model.config._attn_implementation == "sdpa"
    handle.remove()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        teacher.score(PROMPTS, COMPLETIONS)
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_that_lies_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    expand = SharedPrefix.expand

    def broken(self: SharedPrefix, batch_size: int, passes: int | None = None) -> object:
        cache = expand(self, batch_size, passes)
        cache.layers[0].keys = cache.layers[0].keys.roll(1, -2)
        return cache

    monkeypatch.setattr(SharedPrefix, "expand", broken)
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.mode == "recompute"
    assert "computed with every sequence" in caplog.text
    assert divergence(model, teacher.score(PROMPTS, COMPLETIONS).hidden, alone(model)) < 1e-6


def test_packed_rows_that_leak_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama()
    offsets = Packing.__init__

    def broken(self: Packing, *arguments: object) -> None:
        offsets(self, *arguments)
        self.offsets = torch.arange(len(self.offsets))

    monkeypatch.setattr(Packing, "__init__", broken)
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.mode == "padded"
    assert "more than the 1e-06 that rounding explains" in teacher.plan.reason
    assert "padded, not packed" in caplog.text
    assert divergence(model, teacher.score(PROMPTS, COMPLETIONS).hidden, alone(model)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_lost_value_in_forty_is_noticed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expand = SharedPrefix.expand

    def broken(self: SharedPrefix, batch_size: int, passes: int | None = None) -> Any:
        cache: Any = expand(self, batch_size, passes)
        cache.layers[0].values = cache.layers[0].values.clone()
        cache.layers[0].values[:, :, 0] = 0
        return cache

    monkeypatch.setattr(SharedPrefix, "expand", broken)
    plan = SharedPrefixTeacher(tiny_llama().to(dtype), PREFIX).plan
    assert plan.mode == "recompute"
    assert "that rounding explains" in plan.reason


@pytest.mark.parametrize("seed", [4, 25, 36])  # rounding sends a token to other experts
def test_a_right_model_is_not_refused_for_its_noise(seed: int) -> None:
    torch.manual_seed(seed)
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**COMMON | experts)).eval().bfloat16()
    assert SharedPrefixTeacher(model, PREFIX).plan.mode == "packed"


def test_the_noise_is_that_of_autocast() -> None:
    model = tiny_llama()
    assert rounding(model) == 2**-23
    with torch.autocast("cpu", torch.bfloat16):
        assert rounding(model) == 2**-7
        assert SharedPrefixTeacher(model, PREFIX).plan.mode == "packed"


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64}
    model = CpmAntForCausalLM(CpmAntConfig(vocab_size=258, num_hidden_layers=2, **sizes)).eval()
    with pytest.raises(InputError, match="must be causal, but later tokens change"):
        SharedPrefixTeacher(model, PREFIX)
    with pytest.raises(InputError, match="must be causal, but later tokens change"):
        head_of(model)


def test_a_head_that_predicts_several_tokens_at_a_time_is_refused() -> None:
    torch.manual_seed(0)
    names = ("encoder_attention_heads", "decoder_attention_heads")
    sizes = {"hidden_size": 32, "decoder_ffn_dim": 64, "num_decoder_layers": 2}
    heads = {f"num_{name}": 4 for name in names}
    model = ProphetNetForCausalLM(ProphetNetConfig(vocab_size=258, **sizes, **heads)).eval()
    with pytest.raises(InputError, match="must use its output head once for each token"):
        SharedPrefixTeacher(model, PREFIX)


def test_a_model_that_fails_on_a_batch_says_so() -> None:
    model = tiny_llama()

    def fail(_module: Any, _args: Any, options: dict) -> None:
        assert options["position_ids"].shape == options["input_ids"].shape
        raise IndexError("no batches here")

    known = head_of(model)
    model.model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="fails with 'no batches here'"):
        SharedPrefixTeacher(model, PREFIX)
    assert head_of(model) == known


def test_a_layer_that_goes_its_own_way_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that drops its keywords, and one that does not ask for the attention by name."""
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(
        attention, "forward", lambda *a, packed_pass=None, **k: forward(*a, **k), raising=True
    )
    plan = SharedPrefixTeacher(model, PREFIX).plan
    assert plan.mode == "padded"
    assert "must hand its keywords on" in plan.reason

    def by_hand(*a: object, **k: object) -> object:
        model.config._attn_implementation = "sdpa"
        return forward(*a, **k)

    monkeypatch.setattr(attention, "forward", by_hand)
    plan = SharedPrefixTeacher(model, PREFIX).plan
    assert plan.mode == "padded"
    assert "got 1 of 2" in plan.reason


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [9.0] * 4,
    "original_max_position_embeddings": 41,
}


def test_rotary_frequencies_that_depend_on_length() -> None:
    """The prefix alone lies below the limit, every sequence above it."""
    model = tiny_llama(rope_parameters=LONGROPE)
    teacher = SharedPrefixTeacher(model, PREFIX[:38])
    prompts, completions = [[5, 6, 7, 8], [9, 8, 7, 6]], [[3, 4], [5, 3]]
    rows = [PREFIX[:38] + p + c for p, c in zip(prompts, completions, strict=True)]
    with torch.no_grad():
        hidden = model.model(torch.tensor(rows), use_cache=False).last_hidden_state
    expected = hidden[:, -3:-1].flatten(0, 1)
    assert divergence(model, teacher.score(prompts, completions).hidden, expected) < 1e-6


@pytest.mark.parametrize("shared", [True, False])
def test_neighbours_leave_rotary_frequencies_alone(shared: bool) -> None:
    """Sequences and contexts on both sides of the limit, in one call."""
    model = tiny_llama(rope_parameters=LONGROPE)
    contexts = {"short": PREFIX[:20], "long": [*PREFIX, *PREFIX][:50]}
    prompts, completions = [[5, 6, 7], [9, 8], [4, *range(60, 85)]], [[3, 4], [5, 3], [7, 8]]
    names = ["short", "long", "short"]
    teacher = SharedPrefixTeacher(model, contexts, shared=shared)
    found = teacher.score(prompts, completions, names).hidden
    expected = []
    for name, prompt, completion in zip(names, prompts, completions, strict=True):
        row = torch.tensor([[*contexts[name], *prompt, *completion]])
        with torch.no_grad():
            expected.append(model.model(row, use_cache=False).last_hidden_state[0, -3:-1])
    assert divergence(model, found, torch.cat(expected)) < 1e-6


@pytest.mark.parametrize(
    ("kind", "prefix", "longest", "differs"),
    [
        ("default", 10, 1000, False),
        ("longrope", 10, 41, False),
        ("longrope", 41, 42, True),
        ("longrope", 42, 1000, False),
        ("dynamic", 10, 41, False),
        ("dynamic", 42, 1000, True),
    ],
)
def test_where_a_prefix_alone_has_other_rotary_frequencies(
    kind: str, prefix: int, longest: int, differs: bool
) -> None:
    config = tiny_llama().config
    config.rope_parameters = {"rope_type": kind, "original_max_position_embeddings": 41}
    assert rope_differs(config, prefix, longest) == differs


def test_an_architecture_without_a_cache_is_computed_in_full() -> None:
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32
    )
    model = RwkvForCausalLM(config).eval()
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.mode == "recompute"
    assert not teacher.plan.shares_prefix
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


def test_a_prefix_of_other_weights_is_an_error() -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX)
    before = teacher.score(PROMPTS, COMPLETIONS).hidden
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    with pytest.raises(StalePrefixError, match="must stay as it was when its prefix was computed"):
        teacher.score(PROMPTS, COMPLETIONS)
    teacher.refresh()
    after = teacher.score(PROMPTS, COMPLETIONS).hidden
    assert divergence(model, after, alone(model)) < 1e-6
    assert divergence(model, after, before) > 1e-3


def test_a_forgotten_or_trained_adapter_is_an_error() -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    student = get_peft_model(tiny_llama(), lora).eval()
    off = SharedPrefixTeacher(student, PREFIX, frozen=student.disable_adapter)
    on = SharedPrefixTeacher(student, PREFIX)
    expected = off.score(PROMPTS, COMPLETIONS).hidden
    with student.disable_adapter(), pytest.raises(StalePrefixError, match="adapter's state"):
        on.score(PROMPTS, COMPLETIONS)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], fused=True)
    student(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    assert torch.equal(off.score(PROMPTS, COMPLETIONS).hidden, expected), "the adapter is off"
    with pytest.raises(StalePrefixError, match="adapter's state"):
        on.score(PROMPTS, COMPLETIONS)


def test_several_contexts_in_one_batch() -> None:
    model = tiny_llama()
    other = PREFIX[::-1][:25]
    teacher = SharedPrefixTeacher(model, {"a": PREFIX, "b": other})
    names = ["b", "a", "b", "a"]
    hidden = teacher.score(PROMPTS, COMPLETIONS, names).hidden
    rows = hidden.split([len(c) for c in COMPLETIONS])
    for i, name in enumerate(names):
        single = SharedPrefixTeacher(model, {"a": PREFIX, "b": other}[name])
        expected = single.score(PROMPTS[i : i + 1], COMPLETIONS[i : i + 1]).hidden
        assert divergence(model, rows[i], expected) < 1e-6
    with pytest.raises(InputError, match=r"contexts must be among \['a', 'b'\], got \['c'\]"):
        teacher.score(PROMPTS, COMPLETIONS, ["a", "b", "c", "a"])
    with pytest.raises(InputError, match="name one for each"):
        teacher.score(PROMPTS, COMPLETIONS)


def test_prefixes_are_kept_within_their_budget_the_last_used_longest() -> None:
    model = tiny_llama()
    one = SharedPrefix(model, PREFIX).nbytes
    assert one == 2 * 2 * 2 * 8 * 4 * len(PREFIX)  # layers, keys and values, heads, width, fp32
    cache = PrefixCache(model, budget_bytes=2 * one)
    a = cache.get("a", PREFIX)
    cache.get("b", PREFIX)
    assert cache.get("a", PREFIX) is a, "computed once"
    cache.get("c", PREFIX)
    assert cache.names == ["a", "c"]
    assert cache.nbytes == 2 * one
    assert PrefixCache(model, 0).get("a", PREFIX).token_ids == PREFIX


def test_sequences_beyond_the_positions_are_refused() -> None:
    teacher = SharedPrefixTeacher(tiny_llama(max_position_embeddings=50), PREFIX)
    with pytest.raises(InputError, match=r"50 positions, got 40 tokens of context and 11"):
        teacher.score([[5] * 8], [[6] * 3])


@pytest.mark.parametrize("plan_mode", ["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama", "mistral-sliding", "gemma2-softcap", "gemma3-interleaved", "gpt-oss-sinks"]
)
def test_gradients_through_the_packed_row_equal_those_of_each_sequence_alone(
    plan_mode: str, dtype: torch.dtype, name: str
) -> None:
    """Prompts that start alike, so that the gradient also flows into the shared start."""
    model = build(name).requires_grad_(True)
    prompts = [PREFIX + p for p in PROMPTS]

    def gradients(plan: Plan | None, low: bool) -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if plan is not None:
                hidden = planned_hidden(model, completion_rows(prompts, COMPLETIONS), plan)
            else:
                single = [
                    scored_hidden(model, completion_rows([p], [c]))
                    for p, c in zip(prompts, COMPLETIONS, strict=True)
                ]
                hidden = torch.cat(single)
        hidden.float().pow(3).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    low = dtype == torch.bfloat16
    exact, alone_ = gradients(None, low=False), gradients(None, low=low)
    found = gradients(Plan(plan_mode, "", ""), low=low)
    assert len(exact) > 10
    for a, b, e in zip(found, alone_, exact, strict=True):
        noise = (b - e).norm() if low else 1e-5 * e.norm()
        assert (a - e).norm() <= 2 * noise


def test_a_packed_pass_leaves_a_compiled_body_uncompiled() -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX)
    expected = teacher.score(PROMPTS, COMPLETIONS).hidden

    def never(*_: object) -> Any:
        raise AssertionError("every packing would be compiled anew")

    model.model.compile(backend=never)
    assert torch.equal(teacher.score(PROMPTS, COMPLETIONS).hidden, expected)


def test_threads_leave_the_attention_as_it_was() -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX)
    expected = teacher.score(PROMPTS, COMPLETIONS).hidden
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(teacher.score, PROMPTS, COMPLETIONS) for _ in range(12)]
    for job in jobs:
        assert torch.equal(job.result().hidden, expected)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ({}, "at least one context, got none"),
        ([], "at least one token, got none"),
        ({"a": []}, "context 'a' must hold at least one token"),
        ([5, 400], r"token ids from 0 to 257, got 5 to 400"),
        ([5] * 512, "within the model's 512 positions"),
    ],
)
def test_prefixes_that_cannot_be(prefix: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SharedPrefixTeacher(tiny_llama(), prefix)


def test_prompts_without_completions_are_refused() -> None:
    teacher = SharedPrefixTeacher(tiny_llama(), PREFIX)
    with pytest.raises(InputError, match="2 prompts, 1 completions and 2 contexts"):
        teacher.score([[5], [6]], [[7]])


def test_an_adapter_of_another_scale_is_noticed() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), lora).eval()
    teacher = SharedPrefixTeacher(model, PREFIX)
    model.base_model.model.model.layers[0].self_attn.q_proj.scale_layer(0.1)
    with pytest.raises(StalePrefixError):
        teacher.score(PROMPTS, COMPLETIONS)


def test_empty_sequences_are_refused() -> None:
    teacher = SharedPrefixTeacher(tiny_llama(), PREFIX)
    with pytest.raises(InputError, match="every prompt must hold at least one token"):
        teacher.score([[]], [[1]])
    with pytest.raises(InputError, match="every completion must hold at least one token"):
        teacher.score([[1]], [[]])


def test_bf16_teacher_agrees_within_its_noise() -> None:
    model = tiny_llama().bfloat16()
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.mode == "packed"
    hidden = teacher.score(PROMPTS, COMPLETIONS).hidden
    assert divergence(model, hidden, alone(model)) < 0.05


def many_contexts(count: int) -> dict[str, list[int]]:
    """Contexts of unequal lengths."""
    return {f"c{i}": [(7 * i + k) % 200 + 20 for k in range(24 + 3 * i)] for i in range(count)}


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "gpt-oss-sinks"])
def test_sequences_behind_many_contexts_are_one_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as exact as alone behind its own context, and all of them in one row."""
    model, contexts = build(name), many_contexts(4)
    teacher = SharedPrefixTeacher(model, contexts)
    assert teacher.plan.packed
    names = ["c1", "c0", "c3", "c1"]
    expected = [
        SharedPrefixTeacher(model, contexts[c], shared=False).score([p], [done]).hidden
        for c, p, done in zip(names, PROMPTS, COMPLETIONS, strict=True)
    ]
    passes = []
    monkeypatch.setattr(
        "opcd.passes.hidden.packed_pass",
        lambda *args: passes.append(args[1].shape[1]) or packed_pass(*args),
    )
    hidden = teacher.score(PROMPTS, COMPLETIONS, names).hidden
    assert len(passes) == 1
    assert divergence(model, hidden, torch.cat(expected)) < 1e-6


def test_contexts_that_pass_the_budget_take_passes_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, contexts = tiny_llama(), many_contexts(4)
    names = [*contexts]
    whole = SharedPrefixTeacher(model, contexts)
    expected = whole.score(PROMPTS, COMPLETIONS, names).hidden
    small = SharedPrefixTeacher(model, contexts, prefix_cache_bytes=20_000)
    alive: weakref.WeakSet = weakref.WeakSet()
    held = []
    record = SharedPrefix.__init__

    def watched(self: SharedPrefix, *args: object) -> None:
        record(self, *args)
        alive.add(self)
        held.append(sum(prefix.nbytes for prefix in alive))

    monkeypatch.setattr(SharedPrefix, "__init__", watched)
    assert torch.allclose(small.score(PROMPTS, COMPLETIONS, names).hidden, expected, atol=1e-5)
    assert small._prefixes.nbytes <= 20_000 < whole._prefixes.nbytes
    one = max(prefix.nbytes for prefix in alive)
    assert max(held) <= 20_000 + one, "the one that is recorded comes on top"


def test_a_context_is_added_to_a_living_teacher() -> None:
    model, contexts = tiny_llama(), many_contexts(2)
    teacher = SharedPrefixTeacher(model, {"c0": contexts["c0"]})
    with pytest.raises(InputError, match="contexts must be among"):
        teacher.score(PROMPTS[:1], COMPLETIONS[:1], ["c1"])
    teacher.add_context("c1", contexts["c1"])
    teacher.add_context("c1", contexts["c1"])  # the same again
    found = teacher.score(PROMPTS[:2], COMPLETIONS[:2], ["c1", "c0"]).hidden
    both = SharedPrefixTeacher(model, contexts)
    assert torch.equal(found, both.score(PROMPTS[:2], COMPLETIONS[:2], ["c1", "c0"]).hidden)
    with pytest.raises(InputError, match="'c1' stands for 27 other tokens already"):
        teacher.add_context("c1", [5, 6])
    with pytest.raises(InputError, match="must hold at least one token"):
        teacher.add_context("c2", [])
    with pytest.raises(InputError, match="token ids from 0 to 257"):
        teacher.add_context("c2", [300])


def test_episodes_with_several_spans() -> None:
    """What is scored stands where the spans say, also in the middle; the rest is only seen."""
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX)
    ids = [30, 31, 32, 33, 34, 35, 36, 37, 38]
    spans = (Span(2, 3, 2), Span(6, 7, 2))
    episode = Episode(ids, [29, *ids], spans)
    plain = Episode.of_completion(Prompt([5], [6]), [40, 41, 42])
    targets = teacher.score([episode, plain])
    assert targets.lengths == (4, 3)
    with torch.no_grad():
        full = model.model(torch.tensor([[*PREFIX, 29, *ids]])).last_hidden_state[0]
    n = len(PREFIX)
    expected = full[[n + 2, n + 3, n + 6, n + 7]]
    assert torch.allclose(targets.hidden[:4], expected, atol=1e-5)
    assert torch.equal(targets.of([1]).hidden, targets.hidden[4:])
    assert targets.head.weight is model.lm_head.weight


def tiny_moe() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 258}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.2)).eval()


def test_experts_with_an_adapter_are_no_other_weights_where_it_is_off() -> None:
    """peft puts the experts' weights aside and back in every pass with the adapter on."""
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    student = get_peft_model(tiny_moe(), lora).eval()
    teacher = SharedPrefixTeacher(student, PREFIX, frozen=student.disable_adapter)
    expected = teacher.score(PROMPTS, COMPLETIONS).hidden
    student(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    torch.optim.AdamW([p for p in student.parameters() if p.requires_grad]).step()
    assert torch.equal(teacher.score(PROMPTS, COMPLETIONS).hidden, expected)
    with torch.no_grad():
        next(p for name, p in student.named_parameters() if "gate_up_proj" in name).mul_(1.01)
    with pytest.raises(StalePrefixError):
        teacher.score(PROMPTS, COMPLETIONS)


def test_weights_that_are_put_back_are_the_same() -> None:
    model = tiny_llama()
    watch = WeightsWatch(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().clone())
    assert not watch.changed()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    assert watch.changed()
    watch.take()
    assert not watch.changed()


def test_of_layers_that_are_trained_whole_the_used_one_counts() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_llama(), lora).eval()
    with model.disable_adapter():
        off = WeightsWatch(model)
    on = WeightsWatch(model)
    head = model.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["default"].weight += 1
    assert on.changed()
    with model.disable_adapter():
        assert not off.changed()
        with torch.no_grad():
            head.original_module.weight += 1
        assert off.changed()


def test_another_adapter_that_is_not_active_does_not_count() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), lora).eval()
    model.add_adapter("other", lora)
    watch = WeightsWatch(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["other"].weight += 1
    assert not watch.changed()
    with torch.no_grad():
        layer.lora_B["default"].weight += 1
    assert watch.changed()


@pytest.mark.parametrize("shared", [True, False])
def test_other_weights_are_noticed_by_every_plan(shared: bool) -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX, shared=shared)
    with torch.no_grad():
        model.model.norm.weight *= 1.1
    with pytest.raises(StalePrefixError):
        teacher.score(PROMPTS, COMPLETIONS)


def test_a_teacher_in_training_mode_scores_as_in_evaluation_mode() -> None:
    config = OPTConfig(
        vocab_size=258,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
    )
    torch.manual_seed(0)
    model = OPTForCausalLM(config)
    expected = SharedPrefixTeacher(model.eval(), PREFIX).score(PROMPTS, COMPLETIONS).hidden
    model.train()
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert torch.equal(teacher.score(PROMPTS, COMPLETIONS).hidden, expected)
    assert model.training
    assert model.model.decoder.layers[0].training


def test_an_adapter_with_dropout_is_no_false_alarm() -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    student = get_peft_model(tiny_llama(), lora).train()
    off = SharedPrefixTeacher(student, PREFIX, frozen=student.disable_adapter)
    on = SharedPrefixTeacher(student, PREFIX)
    expected = [t.score(PROMPTS, COMPLETIONS).hidden for t in (off, on)]
    student.eval()
    for teacher, hidden in zip((off, on), expected, strict=True):
        assert torch.equal(teacher.score(PROMPTS, COMPLETIONS).hidden, hidden)


def test_refresh_takes_the_head_too() -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX)
    model.lm_head = torch.nn.Linear(32, 258, bias=False)
    with pytest.raises(StalePrefixError):
        teacher.score(PROMPTS, COMPLETIONS)
    teacher.refresh()
    assert teacher.score(PROMPTS, COMPLETIONS).head.weight is model.lm_head.weight


def test_the_callers_autocast_changes_nothing() -> None:
    teacher = SharedPrefixTeacher(tiny_llama(), PREFIX)
    expected = teacher.score(PROMPTS, COMPLETIONS).hidden
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher.score(PROMPTS, COMPLETIONS).hidden, expected)
        low = SharedPrefixTeacher(tiny_llama(), PREFIX)
    rounded = low.score(PROMPTS, COMPLETIONS).hidden
    assert not torch.equal(rounded.float(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low.score(PROMPTS, COMPLETIONS).hidden, rounded)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_teacher_is_a_teacher(how: Any) -> None:
    model = tiny_llama()
    teacher = SharedPrefixTeacher(model, PREFIX)
    expected = teacher.score(PROMPTS, COMPLETIONS).hidden
    other = how(teacher)
    assert other.model is not model
    assert torch.equal(other.score(PROMPTS, COMPLETIONS).hidden, expected)
    with torch.no_grad():
        model.model.norm.weight *= 1.1
    assert torch.equal(other.score(PROMPTS, COMPLETIONS).hidden, expected)


def test_virtual_tokens_are_refused() -> None:
    tuned = get_peft_model(
        tiny_llama(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    )
    with pytest.raises(InputError, match="virtual tokens"):
        SharedPrefixTeacher(tuned, PREFIX)


def test_an_adapter_on_the_embedding() -> None:
    lora = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), lora)
    found = SharedPrefixTeacher(model, PREFIX).score(PROMPTS, COMPLETIONS).hidden
    assert divergence(model, found, alone(model.base_model.model)) < 1e-6


@pytest.mark.parametrize("room", [2, 3, 6, 11])
def test_a_prefix_near_the_end_of_learned_positions(room: int) -> None:
    config = GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=len(PREFIX) + room
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.shares_prefix
    hidden = teacher.score([[5]], [[7] * (room - 1)]).hidden
    assert hidden.shape == (room - 1, 32)


def test_a_state_beside_the_layers_of_a_cache_is_never_shared() -> None:
    model = build("llama")
    forward = model.model.forward

    @wraps(forward)
    def with_state(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if cache_of(output) is not None:
            cache_of(output).running = [torch.zeros(1)]
        return output

    model.model.forward = with_state
    teacher = SharedPrefixTeacher(model, PREFIX)
    assert teacher.plan.mode == "recompute"
    assert "beside them" in teacher.plan.reason


def test_hundreds_of_contexts_cost_in_proportion() -> None:
    """Sizes are summed as prefixes come and go, not at every call."""
    model = tiny_llama()
    cache = PrefixCache(model, 10**9)
    for i in range(5):
        cache.get(str(i), [i + 1, 2, 3])
    sizes = [cache.expected_bytes(str(i), []) for i in range(5)]
    assert cache.nbytes == sum(sizes) == sum(cache.get(str(i), []).nbytes for i in range(5))
    assert cache.expected_bytes("other", [1] * 6) == 2 * sizes[0]
    cache.clear()
    assert cache.nbytes == 0
    assert cache.names == []


def padded(rows: list, left: bool, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((2, len(rows), width), pad)
    mask.zero_()
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("pad", [0, -100])
def test_token_ids_in_the_forms_that_trainers_hold(pad: int) -> None:
    teacher = SharedPrefixTeacher(tiny_llama(), PREFIX)
    expected = teacher.score(PROMPTS, COMPLETIONS).hidden
    tensors = [[torch.tensor(row) for row in rows] for rows in (PROMPTS, COMPLETIONS)]
    arrays = [[np.array(row, dtype=np.int32) for row in rows] for rows in (PROMPTS, COMPLETIONS)]
    for prompts, completions in (tensors, arrays):
        assert torch.equal(teacher.score(prompts, completions).hidden, expected)
    prompts, prompt_mask = padded(PROMPTS, left=True, pad=pad)
    completions, completion_mask = padded(COMPLETIONS, left=False, pad=pad)
    masks = {"prompt_mask": prompt_mask, "completion_mask": completion_mask.bool()}
    assert torch.equal(teacher.score(prompts, completions, **masks).hidden, expected)


@pytest.mark.parametrize(
    ("prompts", "completions", "masks", "message"),
    [
        ([[5]], [[-100]], {}, "from 0 to 257, got -100 to 5; give pads by masks"),
        ([[5]], [[6, 258]], {}, "from 0 to 257, got 5 to 258"),
        ([[5.0]], [[6]], {}, "every prompt must be a row of token ids, got torch.float32"),
        ([5, 6], [[6], [7]], {}, r"every prompt must be a row of token ids, got .* of shape \(\)"),
        ([[5]], [[6, 7]], {"completion_mask": [[1]]}, "must have the shape of completion_ids"),
        ([[5]], [[6, 7, 8]], {"completion_mask": [[1, 0, 1]]}, "got a gap at position 1"),
        ([[5]], [[6, 7]], {"completion_mask": [[0, 0]]}, "completion must hold at least one token"),
    ],
)
def test_token_ids_that_cannot_be(
    prompts: list, completions: list, masks: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SharedPrefixTeacher(tiny_llama(), PREFIX).score(prompts, completions, **masks)


class Wrapped(torch.nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: SharedPrefixTeacher(Wrapped(m), PREFIX), "hand over its .module"),
        (lambda m: SharedPrefixTeacher(torch.nn.Linear(2, 2), PREFIX), "causal LM of transformers"),
        (lambda m: SharedPrefixTeacher("gpt2", PREFIX), "got str; load it with"),
        (lambda m: SharedPrefixTeacher(m.model, PREFIX), "must have an output head"),
        (lambda m: SharedPrefixTeacher(m, "You are"), "encode text with the model's tokenizer"),
        (lambda m: SharedPrefixTeacher(m, [PREFIX]), "every prefix must be a row of token ids"),
        (
            lambda m: SharedPrefixTeacher(m, PREFIX, frozen=torch.no_grad()),
            "pass the function, without calling it",
        ),
        (lambda m: StudentLoss(Wrapped(m)), "wrap a StudentLoss of it"),
    ],
)
def test_what_is_no_model_of_a_teacher_or_student(make: Callable, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(tiny_llama())


def test_a_quantised_head_is_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(tiny_llama(), {torch.nn.Linear}, torch.qint8)
    with pytest.raises(InputError, match="leave the head out of what is quantised"):
        SharedPrefixTeacher(model, PREFIX)


def test_quantised_layers_are_weights_and_a_quantised_head_is_refused() -> None:
    """Of tensors that are made of others, as torchao's are."""
    model = tiny_llama()
    expected = alone(model)
    up = model.model.layers[0].mlp.up_proj
    packed = TwoTensor(up.weight.detach(), up.weight.detach().clone())
    up.weight = torch.nn.Parameter(packed, requires_grad=False)
    inner: Any = up.weight
    watch = WeightsWatch(model)
    assert not watch.changed()
    inner.b[3, 4] += 1
    assert watch.changed()
    inner.b[3, 4] -= 1
    assert divergence(model, expected, alone(model)) < 1e-6

    model.lm_head.weight = torch.nn.Parameter(
        TwoTensor(model.lm_head.weight.detach(), model.lm_head.weight.detach()), requires_grad=False
    )
    with pytest.raises(InputError, match="got TwoTensor; leave the head out of what is quantised"):
        SharedPrefixTeacher(model, PREFIX)


def test_offloaded_weights_are_refused() -> None:
    model = cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    with pytest.raises(InputError, match="where accelerate leaves what it offloads"):
        SharedPrefixTeacher(model, PREFIX)
    with pytest.raises(InputError, match="the head of LlamaForCausalLM must lie on a device"):
        head_of(model)


def test_a_prefix_may_be_a_tensor() -> None:
    teacher = SharedPrefixTeacher(tiny_llama(), torch.tensor(PREFIX))
    assert teacher._prefix_ids == {"": PREFIX}
