"""What recording a graph asks of torch.cuda, played: the order of events, and pools of memory.

The pools are kept as torch's allocator keeps them, with what several versions of it leave of a
recording that failed.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from opcd.passes.packed import packed_attention
from opcd.rollouts import capture
from opcd.rollouts.decode import Decoder


def refusal() -> torch.AcceleratorError:
    """A new one each time: an error keeps the frames that it went through."""
    return torch.AcceleratorError("CUDA error: operation not permitted\nand more")


class FakeGraph:
    """A captured step, played by the step itself."""

    decoder: Decoder
    replays = 0

    def replay(self) -> None:
        self.replays += 1
        with packed_attention(self.decoder._model):
            self.decoder.step()

    def reset(self) -> None:
        """Nothing is given back."""


class Pool(SimpleNamespace):
    """One that can be waited for to be gone."""


class PlayedCuda:
    """`events` has what was asked, in order. Where `fails` is set it is called in the end of a
    recording, and then that is refused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: str = "2.13") -> None:
        self.version = version
        self.events: list[str] = []
        self.fails: Callable[[], None] | None = None
        self.recording: set[int] = set()  # pools
        self.uses: dict[int, int] = {}  # of pools
        capture._stream.cache_clear()
        step = Decoder.step

        def stepped(decoder: Decoder) -> torch.Tensor:
            self.events.append("step")
            return step(decoder)

        def warned(mode: int | str) -> None:
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
            self.events.append(f"sync {mode}")

        generator = SimpleNamespace(
            clone_state=lambda: "a generator that draws", graphsafe_set_state=self.events.append
        )
        monkeypatch.setattr(Decoder, "step", stepped)
        for name, what in {
            "default_generators": (generator,),
            "current_stream": lambda device: "the stream before",
            "Stream": self._stream,
            "set_stream": lambda stream: self.events.append(f"back to {stream}"),
            "device": lambda device: contextlib.nullcontext(),
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": warned,
            "CUDAGraph": self._graph,
            "graph": self._recording,
            "get_allocator_backend": lambda: "native",
            "MemPool": self._pool,
            "empty_cache": self.empty_cache,
        }.items():
            monkeypatch.setattr(torch.cuda, name, what)
        for name in ("end", "release"):
            long = {"end": "_cuda_endAllocateToPool", "release": "_cuda_releasePool"}[name]
            monkeypatch.setattr(torch._C, long, getattr(self, f"_{name}"), raising=False)

    def empty_cache(self) -> None:
        """As torch's: an error while anything is recorded."""
        if self.recording:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.uses = {pool: n for pool, n in self.uses.items() if n}

    def _stream(self, device: torch.device) -> str:
        self.events.append(f"new stream of {device}")
        return f"a stream of {device}"

    def _graph(self) -> FakeGraph:
        graph = FakeGraph()
        graph.reset = lambda: self._reset(graph)
        return graph

    def _pool(self) -> Pool:
        number = 1 + max(self.uses, default=0)
        self.uses[number] = 1
        pool = Pool(id=number, use_count=lambda: self.uses[number])
        weakref.finalize(pool, self._release, 0, number)
        return pool

    def _end(self, device: int, pool: int) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def _release(self, device: int, pool: int) -> None:
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0, "given back twice"

    def _reset(self, graph: FakeGraph) -> None:
        pool = vars(graph).pop("pool", None)
        if pool is not None and (graph.ended or self.version == "later"):
            self._release(0, pool)

    @contextlib.contextmanager
    def _recording(
        self, graph: FakeGraph, pool: int | None, stream: str, capture_error_mode: str
    ) -> Iterator[None]:
        assert stream.startswith("a stream of"), "torch's own is of the first graph's device"
        assert capture_error_mode == "thread_local"
        self.events.append("capture")
        if pool is not None:
            self.uses[pool] += 1
            self.recording.add(pool)
            graph.pool, graph.ended = pool, False
        try:
            yield
        finally:
            if pool is not None and (self.fails is None or self.version != "2.11"):
                self._end(0, pool)
            if self.fails is not None:
                self.fails()
                raise refusal()
            graph.ended = True
            self.events.append("captured")
