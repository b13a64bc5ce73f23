"""Times between marks."""

import time

import pytest
import torch

from opcd.runtime.stopwatch import Stopwatch


def test_laps_are_the_times_between_marks() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.mark()
    time.sleep(0.02)
    watch.mark()
    watch.mark()
    first, second = watch.laps()
    assert 0.02 <= first < 1
    assert 0 <= second < 0.01
    assert watch.laps() == [], "laps are told once"


@pytest.mark.gpu
def test_a_mark_waits_for_nothing_and_a_lap_is_the_gpu_s_own_time() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    x @ x  # the first product loads its library
    watch = Stopwatch(device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    watch.mark()
    for _ in range(50):
        x @ x
    watch.mark()
    queued = time.perf_counter() - begin
    watch.mark()
    work, nothing = watch.laps()
    assert queued < work / 2, "the host must not have waited"
    assert nothing < work / 10
    assert work <= time.perf_counter() - begin
