"""The teacher's benchmark on a shape that is as small as that on a GPU is large."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_prefix
from benchmarks.bench_prefix import CASES, COMPLETIONS, LLAMA, Case, random_llama, test_teacher
from opcd.errors import InputError

test_teacher.__test__ = False  # needs pytest-benchmark
CASE = Case("llama", p=40, lengths="short", times=2)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 40_000,
}


class Benchmark:
    """What the benchmark needs of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict = {}
        self.rounds = 0
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=1.0))

    def pedantic(self, call: Callable, setup: Callable, rounds: int) -> None:
        self.rounds = rounds
        setup()
        call()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The shapes that were asked for, each made small."""
    shapes: list[dict] = []

    def make(**shape: int) -> torch.nn.Module:
        shapes.append(shape)
        return random_llama(**SMALL)

    monkeypatch.setattr(bench_prefix, "random_llama", make)
    monkeypatch.setitem(COMPLETIONS, "short", [12, 30, 5])
    bench_prefix.load.cache_clear()
    bench_prefix.exact.clear()
    yield shapes
    bench_prefix.load.cache_clear()
    bench_prefix.exact.clear()


@pytest.mark.parametrize("provider", bench_prefix.PROVIDERS)
def test_every_way_of_the_large_shape(small: list[dict], provider: str) -> None:
    benchmark = Benchmark()
    test_teacher(benchmark, provider, CASE)
    assert small[0]["num_attention_heads"] == 4 * small[0]["num_key_value_heads"] == 32
    row = benchmark.extra_info
    assert row["model"].startswith("4 layers of Llama-3.1-8B")
    assert (row["P"], row["B"], row["new_tokens"]) == (40, 6, 2 * 47 + 6 * 20)
    assert 0 <= row["divergence"] < 0.02
    assert benchmark.rounds == bench_prefix.ROUNDS


def test_a_way_that_is_wrong_is_not_timed(
    small: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench_prefix, "dynamic_cache", lambda *_: torch.randn_like(bench_prefix.exact[CASE])
    )
    benchmark = Benchmark()
    with pytest.raises(AssertionError, match="not timed"):
        test_teacher(benchmark, "dynamic-cache", CASE)
    assert benchmark.rounds == 0


def test_without_the_weights_the_shape_is_labelled(
    small: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise InputError("no network")

    monkeypatch.setattr(bench_prefix, "load_model", absent)
    name, _ = bench_prefix.smollm2()
    assert "random weights" in name
    assert (small[0]["hidden_size"], small[0]["num_hidden_layers"]) == (576, 30)


def test_the_sequences_of_the_large_shape() -> None:
    lengths = [bench_prefix.PROMPT + n for n in COMPLETIONS["long"]]
    assert (min(lengths), max(lengths), len(lengths)) == (256, 512, 16)
    assert {(case.p, case.times * len(lengths)) for case in LLAMA} == {
        (2048, 16),
        (2048, 64),
        (8192, 16),
        (8192, 64),
    }
    assert set(LLAMA) <= set(CASES) or not torch.cuda.is_available()
