"""How many sequences are sampled at once, where a GPU's memory holds fewer than were asked for."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

T = TypeVar("T")


class BatchSize:
    """A number of sequences that is halved, for good, when memory runs out.

    What a completion draws does not depend on its batch (`noise.py`), so that a call can be made
    again.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def fitting(self, call: Callable[[], T], rows: Callable[[int], int]) -> T:
        """`call()`, made again with half of `size` as long as memory runs out, which is said once.

        `rows` tells how many sequences a size puts into a batch. Raises torch.OutOfMemoryError
        where one alone does not fit.
        """
        asked = rows(self.size)
        while True:
            try:
                found = call()
            except torch.OutOfMemoryError:
                if not self._halve(rows):
                    raise
            else:
                if rows(self.size) < asked:
                    log.warning(
                        "rollouts sample %d sequences at once from now on, not %d: the GPU's "
                        "memory holds no more; completions are the same",
                        rows(self.size),
                        asked,
                    )
                return found
            # Here the error, and what its frames held, are gone.
            gc.collect()
            torch.cuda.empty_cache()

    def _halve(self, rows: Callable[[int], int]) -> bool:
        """Whether there was anything to halve."""
        before = rows(self.size)
        while self.size > 1 and rows(self.size) > max(1, before // 2):
            self.size //= 2
        return rows(self.size) < before
