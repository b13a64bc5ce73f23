"""A step recorded in a CUDA graph; and where CUDA refuses, everything as it was before.

Of a recording that fails torch leaves its stream as the current one, a generator that takes itself
for recorded, and memory: up to torch 2.11 the allocator goes on as if it were recorded, and every
call that frees its cache is an error; later ones only never give the memory back. So a recording
has a pool of memory that is ours, and what is still held of it is let go here.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class GraphError(RuntimeError):
    """CUDA does not record a step that it has run."""


class Recording(NamedTuple):
    """A recorded step."""

    pool: torch.cuda.MemPool | None  # what lies in it is the graph's
    result: Tensor  # of the last replay
    graph: torch.cuda.CUDAGraph


def recorded(step: Callable[[], Tensor], device: torch.device, name: str) -> Recording:
    """Run a step twice, then record it; `name` says whose it is.

    Raises RuntimeError if the step waits for the GPU: a graph would not. Raises GraphError if CUDA
    refuses to record a step that ran, and torch.OutOfMemoryError if memory ran out in that.
    """
    before = torch.cuda.current_stream(device)
    with torch.cuda.device(device):
        step()  # whatever is made on first use is made now
        with _waiting_is_an_error():
            step()
        graph, pool = torch.cuda.CUDAGraph(), _own_pool()
        recording = torch.cuda.graph(
            graph,
            pool=None if pool is None else torch.cuda._POOL_HANDLE(pool.id),
            stream=_stream(device),
            capture_error_mode="thread_local",
        )
        try:
            with recording:
                result = step()
        except BaseException as error:
            torch.cuda.set_stream(before)
            _let_go(graph, pool, device)
            if not isinstance(error, RuntimeError):
                raise
            # Ending a recording that ran out of memory fails too, with another error.
            if any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__)):
                raise torch.OutOfMemoryError(str(error)) from error
            raise GraphError(
                f"a step of {name} does not fit into a CUDA graph: {str(error).splitlines()[0]}"
            ) from error
    return Recording(pool, result, graph)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where a device's steps are recorded.

    Not torch's own, which belongs to the device of the process's first graph; and one alone, since
    cuBLAS keeps a workspace for each stream that it has met.
    """
    return torch.cuda.Stream(device)


def _own_pool() -> torch.cuda.MemPool | None:
    """None where another allocator than torch's was put in its place: that may have no pools."""
    return torch.cuda.MemPool() if torch.cuda.get_allocator_backend() == "native" else None


def _let_go(
    graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool | None, device: torch.device
) -> None:
    """Give back what a recording holds that failed wherever in it."""
    number = device.index or 0
    graph.reset()
    if pool is not None:
        with contextlib.suppress(RuntimeError):  # it is not recorded any more
            torch._C._cuda_endAllocateToPool(number, pool.id)
        if pool.use_count() > 1:  # once is ours
            torch._C._cuda_releasePool(number, pool.id)
    for generator in torch.cuda.default_generators[number : number + 1]:
        generator.graphsafe_set_state(generator.clone_state())


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """torch raises RuntimeError for a call inside that waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    _set_sync_debug_mode("error")
    try:
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    """torch's own, without its warning that this is a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)
