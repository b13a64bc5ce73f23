"""The teacher's benchmark on a shape that is as small as that on a GPU is large."""

from pathlib import Path

import pytest
import torch

from benchmarks import bench_prefix, problems, rates
from benchmarks.bench_prefix import CASES, COMPLETIONS, LLAMA, Case, random_llama, test_teacher
from benchmarks.rounds import Rounds

test_teacher.__test__ = False  # a benchmark
CASE = Case("llama", p=40, lengths="short", times=2)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 40_000,
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The shapes that were asked for, each made small."""
    shapes: list[dict] = []

    def make(**shape: int) -> torch.nn.Module:
        shapes.append(shape)
        return random_llama(**SMALL)

    monkeypatch.setattr(bench_prefix, "random_llama", make)
    monkeypatch.setitem(COMPLETIONS, "short", [12, 30, 5])
    monkeypatch.setattr(rates, "measured", lambda device: rates.Rates(1e12, 1e10))
    bench_prefix.load.cache_clear()
    bench_prefix.exact.clear()
    yield shapes
    bench_prefix.load.cache_clear()
    bench_prefix.exact.clear()


@pytest.mark.parametrize("provider", bench_prefix.PROVIDERS)
def test_every_way_of_the_large_shape(small: list[dict], provider: str) -> None:
    benchmark = Rounds()
    test_teacher(benchmark, provider, CASE)
    assert small[0]["num_attention_heads"] == 4 * small[0]["num_key_value_heads"] == 32
    row = benchmark.facts
    assert row["model"].startswith("4 layers of Llama-3.1-8B")
    assert (row["P"], row["B"], row["new_tokens"]) == (40, 6, 2 * 47 + 6 * 20)
    assert 0 <= row["divergence"] < 0.02
    assert len(benchmark.seconds) == bench_prefix.ROUNDS
    assert row["rates_floor_share"] > 0


def test_a_way_that_is_wrong_is_not_timed(
    small: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench_prefix, "dynamic_cache", lambda *_: torch.randn_like(bench_prefix.exact[CASE])
    )
    benchmark = Rounds()
    with pytest.raises(AssertionError, match="not timed"):
        test_teacher(benchmark, "dynamic-cache", CASE)
    assert not benchmark.seconds


def test_without_the_weights_the_shape_is_labelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is fetched."""
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path))
    monkeypatch.setitem(problems.SHAPES, problems.SMOLLM2, problems.SHAPES["qwen2.5-tiny"])
    name, model = bench_prefix.smollm2()
    assert "random weights" in name
    assert model.config.vocab_size == 1000
    assert not any(p.requires_grad for p in model.parameters())
    assert not list(tmp_path.iterdir())


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
