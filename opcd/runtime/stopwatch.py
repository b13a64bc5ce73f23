"""Times of a device's work, without waiting between its parts."""

import time
from itertools import pairwise

import torch


class Stopwatch:
    """Marks in a device's work, in its order; the seconds between them.

    On a GPU a mark is an event in the queue: the host goes on, and what it prepares meanwhile is
    not a gap in the GPU's work. On a CPU, where nothing is queued, it is the time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Here one part ends and the next begins."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds from each mark to the next; waits for the last one, and forgets them all."""
        if self._events:
            self._events[-1].synchronize()
            laps = [a.elapsed_time(b) / 1000 for a, b in pairwise(self._events)]  # from ms
        else:
            laps = [b - a for a, b in pairwise(self._times)]
        self._times, self._events = [], []
        return laps
