"""The floors count what the method asks for."""

import pytest
import torch

from benchmarks import floors, rates
from benchmarks.floors import Work, floor_s
from benchmarks.problems import SHAPES, Problem, Sizes, sizes_of
from benchmarks.rates import Rates
from tests.conftest import tiny_llama

RATES = Rates(flops=100.0, bytes=10.0)
SIZES = Sizes(body=1000, head=200, attended=30, kept=8, trained=1500)


def test_the_slower_of_products_and_memory_is_a_part_s_time_and_parts_add_up() -> None:
    assert floor_s([Work(200, 10), Work(100, 50)], RATES) == 2 + 5


def test_sizes_are_those_of_the_model() -> None:
    model = tiny_llama()
    sizes = sizes_of(model)
    whole = sum(p.numel() for p in model.parameters())
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert sizes.trained == whole
    assert sizes.head == 258 * 32
    assert sizes.body == whole - norms - 2 * sizes.head  # embeddings have no product
    assert (sizes.attended, sizes.kept) == (2 * 32, 2 * 2 * 16)


def test_the_products_of_a_pass_are_those_that_torch_counts() -> None:
    """All of a causal mask's square is counted there, of attention."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_llama()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(torch.arange(2, 12)[None], use_cache=False)
    sizes = sizes_of(model)
    found = floors.forward(sizes, [(10, 0)]).flops
    half = 4 * sizes.attended * (100 - 55)  # 4 · heads · width of each hidden pair
    assert counter.get_total_flops() - found - half == pytest.approx(0, abs=0.01 * found)


def test_a_longer_prefix_costs_attention_alone() -> None:
    near, far = (floors.forward(SIZES, [(5, before)] * 2).flops for before in (0, 100))
    assert far - near == 4 * SIZES.attended * 2 * 5 * 100


def test_decoding_reads_the_weights_once_a_token() -> None:
    first, *steps = floors.decoding(SIZES, rows=4, prompt=3, completion=2, itemsize=2)
    assert first == floors.forward(SIZES, [(2, 0)] * 4)
    assert [step.bytes for step in steps] == [2 * (1200 + 4 * 8 * held) for held in (3, 4)]
    assert steps[0].flops == 4 * (2 * 1200 + 4 * 30 * 3)


def test_a_loss_s_floor() -> None:
    alone = floors.loss(10, 4, 50, trained=True)
    assert alone == Work(4 * 2 * 10 * 4 * 50, 50 * 4 * 2 * 3)  # two heads, one gradient
    assert floors.loss(10, 4, 50, trained=False) == Work(3 * 2 * 10 * 4 * 50, 50 * 4 * 2)
    in_step = floors.loss(10, 4, 50, trained=True, into_grad=True)
    assert in_step.bytes == 50 * 4 * (4 + 2 + 8)  # fp32 head, bf16 teacher, .grad twice


def test_the_phases_of_a_step() -> None:
    problem = Problem("any", context=7, prompt=3, completions=4, completion=2, micro_batch=4)
    parts = floors.phases(problem, SIZES, itemsize=2)
    assert list(parts) == ["rollout", "teacher", "update"]
    assert parts["teacher"] == [floors.forward(SIZES, [(4, 7)] * 4)]
    passes, head, optimizer = parts["update"]
    assert passes.flops == 3 * floors.forward(SIZES, [(4, 0)] * 4).flops
    assert head.flops == 4 * 2 * (4 * 2) * SIZES.head
    assert optimizer.bytes == 32 * SIZES.trained


def test_rates_are_of_the_time_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SIDE", 64)
    monkeypatch.setattr(rates, "TRIAD_BYTES", 4096)
    monkeypatch.setattr(rates, "_seconds", lambda device, call: call() is None or 0.5)
    rates.measured.cache_clear()
    found = rates.measured(torch.device("cpu"))
    rates.measured.cache_clear()
    assert found == (2 * 64**3 / 0.5, 3 * 4096 / 0.5)
    assert rates.sheet(torch.device("cpu")) is None


def test_shapes_have_the_fields_that_sizes_need() -> None:
    for make in SHAPES.values():
        config = make()
        assert config.hidden_size % config.num_attention_heads == 0
