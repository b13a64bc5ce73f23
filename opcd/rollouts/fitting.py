"""How many sequences are sampled at once, where a GPU's memory holds fewer than were asked for."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from opcd.errors import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")


class BatchSize:
    """A number of sequences that is halved, for good, when memory runs out.

    What a completion draws does not depend on its batch (`noise.py`), so that a call can be made
    again.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.holds_all = True  # batches of open conversations, one beside the other

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
            freed()

    def holding(
        self, call: Callable[[], T], let_go: Callable[[], None], rows: Callable[[int], int]
    ) -> T:
        """`fitting` for conversations, whose batches hold memory between calls.

        Where it runs out they `let_go`, and hold one batch at a time from now on, which is said
        once; only then there are fewer sequences in it.
        """

        def attempt() -> T:
            try:
                return call()
            except torch.OutOfMemoryError:
                let_go()
                if not self.holds_all:
                    raise
            freed()
            self.holds_all = False
            log.warning(
                "conversations are computed again in every turn from now on, a batch at a time: "
                "the GPU's memory does not hold all that are open; completions are the same"
            )
            return attempt()

        return self.fitting(attempt, rows)

    def _halve(self, rows: Callable[[int], int]) -> bool:
        """Whether there was anything to halve."""
        before = rows(self.size)
        while self.size > 1 and rows(self.size) > max(1, before // 2):
            self.size //= 2
        return rows(self.size) < before


def too_long(tokens: int, error: torch.OutOfMemoryError) -> InputError:
    """What is said where not even one sequence fits."""
    return InputError(
        f"a rollout must fit the GPU's memory, but one sequence of up to {tokens} tokens "
        f"alone does not: {str(error).splitlines()[0]}; lower max_completion_tokens, "
        f"shorten the context, or take a smaller model"
    )


def freed() -> None:
    """Call it where the error, and what its frames held, are gone."""
    gc.collect()
    torch.cuda.empty_cache()
