"""What only a GPU can show: memory, synchronisation, races, large offsets."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opcd_kernels import linear_divergence, tuned
from opcd_kernels.backends import DESIGNS
from opcd_kernels.chunks import Gradients, Inputs, Work
from opcd_kernels.options import KINDS, Options
from opcd_kernels.sizes import default_sizes, entry, gpu_bytes
from opcd_kernels.trial import why_not
from tests.opcd_kernels.problems import error, no_dual_product

pytestmark = pytest.mark.gpu
V = 151936
GB = 10**9


@pytest.fixture(params=DESIGNS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton_dual" and (reason := no_dual_product()):
        pytest.skip(reason)
    return request.param


def inputs(n: int, d: int, v: int = V) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    h, w = normal(n, d), normal(v, d) * (2.4 / d**0.5)
    h_t = h + 0.1 * normal(n, d)
    low = [x.bfloat16() for x in (h, w, h_t)]
    return low[0].requires_grad_(), low[1].requires_grad_(), low[2], low[1].detach()


def scratch(tensors: tuple[Tensor, ...], backend: str) -> int:
    """Peak bytes beyond the inputs and the gradients as they are accumulated, in fp32."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_divergence(*tensors, chunk_tokens=2048, backend=backend)
    torch.cuda.synchronize()
    gradients = tensors[0].nbytes + 2 * tensors[1].nbytes
    return torch.cuda.max_memory_allocated() - before - gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_auto_takes_agrees_with_torch(dtype: torch.dtype, backend: str) -> None:
    """Everything that a user may ask for, as on first use."""
    if backend == "triton_dual" and dtype != torch.bfloat16:
        pytest.skip("bf16 alone")
    h, w, h_t, w_t = (x.detach().to(dtype) for x in inputs(64, 512, 5003))
    weights = torch.full((64,), 1 / 64)
    for kind in KINDS[:3]:
        work = Work(None, dtype, backend, Gradients(True, True, False))
        given = Inputs(h, w, None, h_t, w_t, None, weights, None, None, None)
        assert why_not(backend, given, Options(kind, 0.5, 1.0, None, None, 5003), work) is None


@pytest.fixture
def strict_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_the_default_sizes_fit_the_memory(backend: str) -> None:
    device, budget = (
        torch.device("cuda"),
        gpu_bytes(torch.cuda.get_device_properties(0).total_memory),
    )
    sizes = default_sizes(device, V, torch.bfloat16, backend)
    assert 0.7 * budget < entry(backend, device, torch.bfloat16).bytes(sizes, V) <= budget


def test_scratch_does_not_grow_with_the_number_of_tokens(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # blocks that were tuned here are no bound
    tuned._rows_of.cache_clear()
    few = scratch(inputs(8192, 512), backend)
    many = scratch(inputs(65536, 512), backend)
    assert few <= 1.4 * GB
    assert many <= few + 0.1 * GB
    assert many < 8192 * V * 4
    tuned._rows_of.cache_clear()


@pytest.mark.usefixtures("strict_synchronisation")
@pytest.mark.parametrize("weights_on", ["cpu", "cuda"])
def test_nothing_waits_for_the_gpu(weights_on: str, backend: str) -> None:
    tensors = inputs(300, 64, 5000)
    weights = torch.ones(300)
    weights[::3] = 0
    weights = weights if weights_on == "cpu" else weights.pin_memory().cuda(non_blocking=True)
    bias = None if backend == "triton_dual" else torch.zeros(5000, device="cuda")
    out = linear_divergence(*tensors, weights, student_bias=bias, backend=backend)
    out.loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert out.per_token[1::3].gt(0).all()
    assert out.per_token[::3].eq(0).all()


@pytest.mark.usefixtures("strict_synchronisation")
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_mixtures_and_targets_wait_for_nothing(on: str) -> None:
    h, w, h_t, w_t = inputs(300, 64, 5000)
    weights, shares, targets = torch.ones(300), torch.rand(300), torch.randint(5000, (300,))
    weights[::3], targets[::3] = 0, -100
    given = [weights, shares, targets, 0.1 * weights]
    if on == "cuda":
        given = [x.pin_memory().cuda(non_blocking=True) for x in given]
    results = []
    for backend in ("torch", "triton"):
        h.grad = None
        out = linear_divergence(
            *(h, w, h_t, w_t, given[0]),
            forward_share=given[1],
            target_ids=given[2],
            logprob_weights=given[3],
            backend=backend,
        )
        out.loss.backward()
        results.append([*out, h.grad])
    torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(*results, strict=True):
        assert error(a, b) < 0.004
    assert out.logprobs is not None
    assert out.logprobs[::3].eq(0).all()
    assert out.logprobs[1::3].lt(0).all()


@pytest.mark.usefixtures("strict_synchronisation")
def test_adding_the_heads_gradient_waits_for_nothing_either(backend: str) -> None:
    h, w, h_t, w_t = inputs(300, 64, 5000)
    w = w.detach().float().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        linear_divergence(h, w, h_t, w_t, backend=backend).loss.backward()
        expected, w.grad = w.grad, None
        out = linear_divergence(h, w, h_t, w_t, backend=backend, add_weight_grad=True)
    out.loss.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert error(w.grad, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_gradient_does_not_overtake_the_logits_it_comes_from(dtype: torch.dtype) -> None:
    h, w, h_t, w_t = (x.detach().to(dtype) for x in inputs(2048, 64))
    results = []
    for backend in ("torch", "triton", "triton", "triton"):
        leaf = h.clone().requires_grad_()
        out = linear_divergence(leaf, w, h_t, w_t, backend=backend)
        out.loss.backward()
        results.append((leaf.grad, out.per_token))
    for grad, per_token in results[1:]:
        assert error(grad, results[0][0]) < 0.004
        assert error(per_token, results[0][1]) < 1e-5
        assert torch.equal(grad, results[1][0])


def test_tiles_written_under_the_next_product_are_whole() -> None:
    """A program of the dual product multiplies some seventy tiles in turn."""
    h, w, h_t, w_t = (x.detach() for x in inputs(1024, 256))
    if reason := no_dual_product():
        pytest.skip(reason)
    results = []
    for backend in ("torch", "triton_dual", "triton_dual", "triton_dual"):
        for head in (w_t, w_t.clone()):  # one matrix, two matrices
            leaf = h.clone().requires_grad_()
            out = linear_divergence(leaf, w, h_t, head, backend=backend)
            out.loss.backward()
            results.append((leaf.grad, out.per_token))
    for i, (grad, per_token) in enumerate(results[2:], 2):
        assert error(grad, results[0][0]) < 0.004
        assert error(per_token, results[0][1]) < 1e-4
        assert torch.equal(grad, results[2 + i % 2][0])


def test_a_chunk_beyond_two_to_the_31(backend: str) -> None:
    """Its products, and the offsets of the dual kernel; those of rows: test_rows_triton.py."""
    n = 2**31 // V + 3
    if torch.cuda.get_device_properties(0).total_memory < 60 * GB:
        pytest.skip("needs 60 GB")
    h, w, h_t, w_t = inputs(n, 64)
    whole = linear_divergence(h, w, h_t, w_t, torch.ones(n), chunk_tokens=n, backend=backend)
    whole.loss.backward()
    last = h.detach()[-2:].requires_grad_()
    part = linear_divergence(last, w, h_t[-2:], w_t, torch.ones(2), chunk_tokens=2, backend=backend)
    part.loss.backward()
    assert h.grad is not None
    assert error(whole.per_token[-2:], part.per_token) < 1e-5
    assert error(h.grad[-2:], last.grad) < 0.004


def test_autocast_keeps_master_weights_in_fp32() -> None:
    h, w, h_t, w_t = (x.detach().float() for x in inputs(256, 64, 5000))
    w.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        linear_divergence(h, w, h_t, w_t).loss.backward()
    exact = w.detach().double().requires_grad_()
    linear_divergence(h.double(), exact, h_t.double(), w_t.double()).loss.backward()
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert error(w.grad, exact.grad) < 0.005
