"""How many tokens at a time: arithmetic, for GPUs that need not be here."""

import pytest
import torch

from opcd_kernels.sizes import (
    Entry,
    Sizes,
    default_sizes,
    entry,
    gpu_bytes,
    scratch_bytes,
    sizes_for,
    split,
    whole,
)

GB = 10**9
QWEN, GEMMA, SMOLLM = 151936, 256000, 49152
CARDS = {24: 25.4e9, 32: 34.2e9, 40: 42.4e9, 80: 85.0e9, 141: 150.7e9}  # bytes that are there
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def at(card: int, v: int, of: Entry) -> Sizes:
    return split(gpu_bytes(int(CARDS[card])), v, of)


@pytest.mark.parametrize(
    ("card", "gb"), [(24, 1.27), (32, 1.3), (40, 1.3), (80, 2.55), (141, 4.521)]
)
def test_the_loss_holds_a_share_of_the_memory(card: int, gb: float) -> None:
    assert gpu_bytes(int(CARDS[card])) == pytest.approx(gb * GB)


@pytest.mark.parametrize(
    ("card", "v", "sizes"),
    [
        (24, QWEN, Sizes(3072, 256)),
        (32, QWEN, Sizes(3072, 256)),
        (40, QWEN, Sizes(3072, 256)),
        (80, QWEN, Sizes(6144, 512)),
        (141, QWEN, Sizes(12800, 512)),
        (24, GEMMA, Sizes(1280, 256)),
        (80, GEMMA, Sizes(3072, 384)),
        (24, SMOLLM, Sizes(10752, 512)),
    ],
)
def test_a_block_of_a_few_hundred_and_a_chunk_of_thousands(card: int, v: int, sizes: Sizes) -> None:
    of = entry("triton", CUDA, BF16)
    assert of == entry("torch", CUDA, BF16) == Entry(8, 2)
    assert at(card, v, of) == sizes
    assert 0.8 * gpu_bytes(int(CARDS[card])) < of.bytes(sizes, v) <= gpu_bytes(int(CARDS[card]))


@pytest.mark.parametrize(("card", "tokens"), [(24, 1920), (80, 3968)])
def test_the_dual_product_holds_four_bytes_an_entry(card: int, tokens: int) -> None:
    of = entry("triton_dual", CUDA, BF16)
    assert 4 <= of.gradient < 4.2
    assert at(card, QWEN, of) == Sizes(tokens, tokens)


def test_a_gradient_as_wide_as_the_logits_lies_over_them() -> None:
    assert entry("triton", CUDA, FP32) == Entry(4, 4)
    assert entry("torch", CUDA, FP64) == Entry(8, 8)
    assert entry("torch", CPU, BF16) == entry("torch", CPU, FP32) == Entry(4, 4)


@pytest.mark.parametrize("budget", [10**5, 10**7, 10**8, GB, 10 * GB])
@pytest.mark.parametrize("of", [Entry(8, 2), Entry(4, 4), Entry(0, 4.2)])
@pytest.mark.parametrize("v", [1, 1000, GEMMA])
def test_never_more_than_the_bytes_but_for_a_token(budget: int, of: Entry, v: int) -> None:
    for sizes in (split(budget, v, of), whole(budget, v, of)):
        assert sizes.chunk >= sizes.block >= 1
        assert sizes.chunk % sizes.block == 0
        assert of.bytes(sizes, v) <= budget or sizes == (1, 1)


def test_a_measured_block_leaves_the_chunk_the_rest() -> None:
    budget, of = gpu_bytes(int(CARDS[80])), Entry(8, 2)
    assert split(budget, QWEN, of, block=1024) == Sizes(4096, 1024)
    assert split(budget, QWEN, of, block=256) == Sizes(7168, 256)
    small = split(10**7, QWEN, of, block=1024)
    assert of.bytes(small, QWEN) <= 10**7


def test_on_a_cpu_a_chunk_is_a_block() -> None:
    assert default_sizes(CPU, SMOLLM, FP32, "torch") == Sizes(256, 256)
    assert default_sizes(CPU, SMOLLM, BF16, "torch") == Sizes(256, 256)
    assert sizes_for(1024, Sizes(256, 256), 512) == Sizes(512, 512)


@pytest.mark.parametrize(
    ("tokens", "chunk_tokens", "sizes"),
    [
        (8192, None, Sizes(4096, 512)),  # two of one size
        (5000, None, Sizes(5000, 512)),
        (300, None, Sizes(300, 300)),
        (0, None, Sizes(1, 1)),
        (8192, 2048, Sizes(2048, 512)),
        (8192, 100, Sizes(100, 100)),
        (9000, 50_000, Sizes(9000, 512)),
    ],
)
def test_chunks_of_a_call(tokens: int, chunk_tokens: int | None, sizes: Sizes) -> None:
    assert sizes_for(tokens, Sizes(6144, 512), chunk_tokens) == sizes


def test_scratch_is_what_is_held() -> None:
    head = torch.empty(SMOLLM, 576, device="meta")
    few, many = (_on_cpu(n, head) for n in (256, 100_000))
    assert few == many
    assert 2 * 4 * 256 * SMOLLM < many < 2 * 4 * 256 * SMOLLM + 20 * 2**20


def _on_cpu(tokens: int, head: torch.Tensor) -> int:
    return scratch_bytes(tokens, head, head, FP32)
