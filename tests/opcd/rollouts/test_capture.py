"""A recording that fails leaves nothing behind: neither memory nor an allocator that records."""

import gc
from collections.abc import Callable

import pytest
import torch

from opcd.rollouts.capture import GraphError, recorded
from opcd.rollouts.decode import Decoder
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.protocol import SamplingParams
from opcd.rollouts.static import StaticEngine
from tests.conftest import tiny_llama
from tests.opcd.rollouts.played_cuda import PlayedCuda, refusal

DEVICE = torch.device("cuda", 0)
VERSIONS = ["2.11", "2.13", "later"]  # of torch: by what they leave behind


class Step:
    """A step that raises something in its n-th run, or runs."""

    def __init__(self, number: int, error: Callable[[], BaseException] | None) -> None:
        self.left, self.error = number, error

    def __call__(self) -> torch.Tensor:
        self.left -= 1
        if self.left == 0 and self.error is not None:
            raise self.error()
        return torch.zeros(1)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("in_step", "in_the_end", "raised"),
    [
        (refusal, True, GraphError),  # a step that CUDA forbids invalidates what is recorded
        (None, True, GraphError),
        (lambda: torch.OutOfMemoryError("CUDA out of memory"), True, torch.OutOfMemoryError),
        (lambda: torch.OutOfMemoryError("CUDA out of memory"), False, torch.OutOfMemoryError),
        (lambda: NotImplementedError("no such kernel"), False, GraphError),
        (lambda: KeyError("a model's own"), True, GraphError),
        (lambda: KeyError("a model's own"), False, KeyError),
        (KeyboardInterrupt, False, KeyboardInterrupt),
    ],
)
def test_a_recording_that_fails_leaves_nothing(
    version: str,
    in_step: Callable[[], BaseException] | None,
    in_the_end: bool,
    raised: type,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = PlayedCuda(monkeypatch, version)
    if in_the_end:
        cuda.fails = lambda: None
    with pytest.raises(raised):
        recorded(Step(3, in_step), DEVICE, "a model")
    assert cuda.events[-2:] == ["back to the stream before", "a generator that draws"]
    assert not cuda.recording
    gc.collect()  # the error and its frames are gone
    cuda.empty_cache()
    assert not cuda.uses, "memory is held"
    cuda.fails = None
    recording = recorded(Step(0, None), DEVICE, "a model")
    assert [*cuda.uses.values()] == [2], "ours and the graph's"
    recording.graph.reset()
    del recording
    gc.collect()
    cuda.empty_cache()
    assert not cuda.uses


def test_another_allocator_has_no_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PlayedCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "MemPool", None)
    assert recorded(Step(0, None), DEVICE, "a model").pool is None
    cuda.fails = lambda: None
    with pytest.raises(GraphError):
        recorded(Step(0, None), DEVICE, "a model")


def test_a_device_has_one_stream_for_all_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = PlayedCuda(monkeypatch)
    for device in (DEVICE, DEVICE, torch.device("cuda", 1), DEVICE):
        recorded(Step(0, None), device, "a model")
    streams = [event for event in cuda.events if event.startswith("new stream")]
    assert streams == ["new stream of cuda:0", "new stream of cuda:1"]


@pytest.mark.parametrize("version", VERSIONS)
def test_memory_that_runs_out_in_a_recording_is_found_for_fewer(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache is emptied between: an error as long as anything is recorded."""
    model = tiny_llama()
    prompts = [[5], [6, 7, 8], [9, 10]]
    params = SamplingParams(6, temperature=1.0)
    expected = TransformersEngine(model).generate(prompts, params, range(3))
    cuda = PlayedCuda(monkeypatch, version)
    capture = Decoder.capture

    def captured(decoder: Decoder) -> None:
        cuda.fails = out_of_memory if decoder.rows > 1 else None
        capture(decoder)
        decoder._recorded.graph.decoder = decoder

    monkeypatch.setattr(Decoder, "capture", captured)
    engine = StaticEngine(model, 4)
    engine._graphed = True
    assert engine.generate(prompts, params, range(3)) == expected
    assert engine._decoder.rows == 1
    assert engine.name == "static"
    (record,) = caplog.records
    assert "sample 1 sequences at once from now on, not 3" in record.getMessage()
    gc.collect()
    cuda.empty_cache()
    assert [*cuda.uses.values()] == [2], "that of the one decoder"


@pytest.mark.gpu
def test_a_recording_that_cuda_invalidates() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(1024, 1024, device=device)

    def step() -> torch.Tensor:
        y = x @ x  # memory of the recording's own
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return y

    step()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    for _ in range(3):
        with pytest.raises(GraphError):
            recorded(step, device, "a model")
        gc.collect()
        torch.cuda.empty_cache()
    # A workspace of cuBLAS stays with the stream, once.
    assert torch.cuda.memory_reserved(device) <= before + 96 * 2**20
    assert torch.randn(3, device=device).isfinite().all(), "the generator draws"
    held = recorded(lambda: x @ x, device, "a model")
    held.graph.replay()
    assert torch.allclose(held.result, x @ x)
