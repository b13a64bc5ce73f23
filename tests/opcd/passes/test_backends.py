"""Which attention a layer takes: what could, and what works when it is tried."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opcd.passes import backends
from opcd.passes.attention import Operands, Shape, prefix_attention
from opcd.passes.backends import Kind, candidates, choose_backend, works
from opcd.passes.flash import KERNELS, Lengths, VarlenFlash
from opcd.passes.packing import Packing
from tests.attention_oracle import LENGTHS, oracle, problem
from tests.opcd.passes.test_attention import attended, played_backward

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KIND = Kind(CUDA, torch.bfloat16, 64, 64, 4, False, False, False, False)
HERE = KIND._replace(device=CPU, dtype=torch.float32)


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    backends._FOUND.clear()
    backends._is_there.cache_clear()
    yield
    backends._FOUND.clear()
    backends._is_there.cache_clear()


def test_what_could_compute_a_layer() -> None:
    flash = "aten flash, cuda"
    assert candidates(KIND)[-2:] == (flash, "plain")
    assert candidates(KIND._replace(sinks=True))[-2:] == (flash, "plain")
    assert candidates(KIND._replace(grad=True)) == (flash, "plain")
    for change in (
        {"grad": True, "sinks": True},
        {"grad": True, "window": True},
        {"dtype": torch.float32},
        {"width": 320},
        {"value_width": 32},
        {"device": torch.device("meta")},
    ):
        assert candidates(KIND._replace(**change)) == ("plain",), change
    windows = candidates(KIND._replace(window=True, softcap=True))
    assert windows in (("triton", "plain"), ("plain",))


NOT_USABLE = {
    "version 4": {"cute/__init__.py": ""},  # a namespace package, without the function
    "for another torch": {"__init__.py": "raise ImportError('undefined symbol: _ZN3c10')"},
    "for another GPU": {
        "__init__.py": "def flash_attn_varlen_func(*_, **__):\n"
        "    raise RuntimeError('no kernel image is available')"
    },
}


@pytest.mark.parametrize("what", NOT_USABLE)
def test_a_flash_attn_that_is_not_usable_counts_as_absent(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in NOT_USABLE[what].items():
        file = tmp_path / "flash_attn" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    importlib.invalidate_caches()
    names = candidates(KIND)
    assert names == ("flash-attn package", "aten flash, cuda", "plain"), "it is found"
    play(monkeypatch, attended)
    monkeypatch.setattr(backends, "candidates", lambda kind: names)
    for _ in range(2):
        assert chosen_as_on_a_gpu(HERE) == "aten flash, cuda"
    (record,) = caplog.records
    assert "attention does not use flash-attn package on cpu: " in record.getMessage()
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


def chosen_as_on_a_gpu(kind: Kind) -> str:
    """On a CPU nothing is tried: its kernel is torch's own."""
    return next(x for x in backends.candidates(kind) if x == "plain" or works(x, kind))


def play(monkeypatch: pytest.MonkeyPatch, forward: object) -> None:
    """aten's kernels for CUDA, played on a CPU."""

    def kept(q: Tensor, k: Tensor, v: Tensor, at: Lengths) -> tuple:
        return *forward(q, k, v, at), (torch.tensor([len(q), len(k)]),)

    monkeypatch.setitem(KERNELS, "aten flash, cuda", VarlenFlash(kept, played_backward))


@pytest.mark.parametrize("grad", [False, True])
def test_a_kernel_that_works_is_used(
    grad: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    play(monkeypatch, attended)
    with torch.inference_mode():  # which knows no gradients
        assert works("aten flash, cuda", HERE._replace(grad=grad))
    assert works("aten flash, cuda", HERE._replace(grad=grad, group=1, sinks=not grad))
    assert not caplog.records


def test_a_wrong_kernel_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def half_a_scale(q: Tensor, k: Tensor, v: Tensor, at: Lengths) -> tuple[Tensor, Tensor]:
        return attended(q, k, v, at._replace(scale=at.scale / 2))

    play(monkeypatch, half_a_scale)
    for _ in range(2):
        assert not works("aten flash, cuda", HERE)
    (record,) = caplog.records
    assert "on 24 tokens output differ from plain attention's by 0." in record.getMessage()


def test_a_wrong_gradient_is_found_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, attended)

    def backward(*arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = played_backward(*arguments)
        return dq, torch.full_like(dk, torch.nan), dv

    kernel = KERNELS["aten flash, cuda"]
    monkeypatch.setattr(kernel, "_backward", backward)
    assert works("aten flash, cuda", HERE)
    assert not works("aten flash, cuda", HERE._replace(grad=True))


def test_memory_that_runs_out_says_nothing_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    play(monkeypatch, full)
    with pytest.raises(torch.OutOfMemoryError):
        works("aten flash, cuda", HERE)


def test_the_triton_kernel_is_tried_with_all_that_it_can_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here")
    assert works("triton", HERE._replace(window=True, softcap=True, sinks=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,) * 9, (1,)], ids=["mixed", "ones", "one"])
@pytest.mark.parametrize("prefix", [0, 13])
@pytest.mark.parametrize("name", ["flash-attn package", "aten flash, cuda"])
def test_kernels_of_variable_length_equal_the_definition(
    name: str, prefix: int, lengths: tuple[int, ...], kv_heads: int
) -> None:
    kind = KIND._replace(width=16, value_width=16, group=6 // kv_heads)
    if name not in candidates(kind) or not works(name, kind):
        pytest.skip(f"{name} does not run here")
    p = problem(prefix, kv_heads=kv_heads)
    n = sum(lengths)
    p = p._replace(query=p.query[:n], key=p.key[:n], value=p.value[:n])
    expected = oracle(p, 0.3, lengths=lengths)
    plain = oracle(p.to(torch.bfloat16), 0.3, lengths=lengths)
    query, key, value, keys, values = (x.to("cuda", torch.bfloat16) for x in p)
    operands = Operands(query, key, value, (keys,), (values,))
    out = prefix_attention(operands, Packing([lengths], CUDA), Shape(0.3), name).cpu()
    bound = 2 * (plain.double() - expected).abs().max() + 1e-6
    assert (out.double() - expected).abs().max() <= bound


@pytest.mark.gpu
def test_gradients_of_the_kernel_for_cuda() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("torch's FlashAttention needs compute capability 8.0")
    assert choose_backend(KIND._replace(grad=True)) == "aten flash, cuda"
