"""Which of torch's attentions the models' passes take: any but cuDNN's.

From torch 2.11 on cuDNN comes first on Hopper and Blackwell. It plans anew for every batch and
length that it has not seen, which takes longer than a pass does, and nearly every pass here is such
a one. Its backward has returned NaN behind a mask (pytorch issue 196678).
"""

import contextlib
import threading
from collections.abc import Iterator

import torch


class _Setting:
    """torch has one for the process; passes may overlap in time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = False

    def enter(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.cuda.enable_cudnn_sdp(self._before)


_SETTING = _Setting()


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """`scaled_dot_product_attention` inside takes another kernel; the user's value comes back.

    A forward pass decides for its backward too. Where layers are computed again in the backward
    (gradient checkpointing), that must be inside as well. Nothing happens under torch.compile.
    """
    if torch.compiler.is_compiling():
        yield
        return
    _SETTING.enter()
    try:
        yield
    finally:
        _SETTING.leave()
