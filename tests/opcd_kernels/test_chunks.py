"""Chunks of several blocks: what a GPU does, here with a few tokens."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from opcd_kernels import chunks
from opcd_kernels.sizes import Sizes
from tests.opcd_kernels.problems import WHERE, Where, assert_as_exact_as_plain, problem

everywhere = pytest.mark.parametrize("where", WHERE)
# −inf − −inf is computed, and then not selected.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
SIZES = Sizes(chunk=5, block=2)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "sizes_for", lambda *_: SIZES)


@pytest.mark.usefixtures("small")
@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [51, 1100])  # neither a multiple of 16, nor of a kernel's block
def test_blocks_and_chunks_give_what_the_definition_gives(
    v: int, dtype: torch.dtype, where: Where
) -> None:
    """Three chunks, the last one shorter, after each other in the same memory."""
    assert_as_exact_as_plain(problem(n=13, v=v), dtype, where)


@pytest.mark.usefixtures("small")
@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "mixture", "targets"])
def test_whatever_is_asked_of_a_row(kind: str, dtype: torch.dtype, where: Where) -> None:
    generator = torch.Generator().manual_seed(1)
    t = problem(n=13)
    t["token_weights"] = torch.rand(13, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {
        "divergence": kind if kind in ("forward_kl", "jsd") else "reverse_kl"
    }
    if kind == "mixture":
        t["forward_share"] = torch.rand(13, generator=generator, dtype=torch.float64)
    if kind == "targets":
        t["target_ids"] = torch.randint(51, (13,), generator=generator)
        t["logprob_weights"] = torch.rand(13, generator=generator, dtype=torch.float64)
    assert_as_exact_as_plain(t, dtype, where, **options)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_in_pytorch_round_into_memory_of_its_own_as_on_a_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "gradient_dtype", lambda *_: dtype)
    assert_as_exact_as_plain(problem(n=13), dtype, Where("torch", "cpu"))
