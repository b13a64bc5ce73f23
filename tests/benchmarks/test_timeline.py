"""The analysis of a step's profile, on made-up events and on a real profile of a CPU."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.timeline import Range, Work, analyse, innermost, read_trace

# The host launches all of `a` at once and goes on to `b` while the device is still at it.
HOST = [
    Range("a", 0.0, 2.0),
    Range("launch", 0.5, 1.0),
    Range("b", 2.0, 12.0),
    Range("read", 7.0, 9.0),
    Range("copy", 7.5, 8.5),
]
WORK = [
    Work("k1", 1.0, 3.0, 0.6),
    Work("k2", 1.5, 2.5, 0.7),  # on another stream
    Work("k3", 3.0, 6.0, 0.8),
    Work("k1", 6.5, 7.0, 3.0),
    Work("k1", 9.0, 10.0, 3.0),  # of the same graph
    Work("late", 30.0, 31.0, 20.0),  # of no phase
]


def test_a_phase_has_the_work_that_it_launched() -> None:
    found = analyse(HOST, WORK, ["a", "b"])
    a, b = found["a"], found["b"]
    assert list(found) == ["a", "b"]
    # from 0 until its last kernel is done at 6; idle before the first one
    assert (a.wall_ms, a.busy_ms, a.idle_share) == pytest.approx((6000, 5000, 1 / 6))
    assert (a.launches, a.kernels) == (3, 3)
    # from 6, when the device is free, until the host leaves at 12
    assert (b.wall_ms, b.busy_ms, b.idle_share) == pytest.approx((6000, 1500, 0.75))
    assert (b.launches, b.kernels) == (1, 2)
    assert b.top == [("k1", pytest.approx(1500), 2)]


def test_gaps_are_named_by_what_the_host_did() -> None:
    found = analyse(HOST, WORK, ["a", "b"])
    assert found["a"].gaps == [(1000, "launch", "k1")]
    assert [(round(g.ms), g.host, g.before) for g in found["b"].gaps] == [
        (2000, "copy", "k1"),
        (2000, "b", "the end"),
        (500, "b", "k1"),
    ]
    assert len(analyse(HOST, WORK, ["b"], top=1)["b"].gaps) == 1
    assert innermost(HOST, 13.0) == "nothing recorded"


def test_steps_are_averaged() -> None:
    later = 100.0
    host = HOST + [Range(n, a + later, b + later) for n, a, b in HOST]
    work = WORK + [Work(n, *(t + later for t in times)) for n, *times in WORK]
    once, twice = analyse(HOST, WORK, ["a", "b"]), analyse(host, work, ["a", "b"])
    for name, phase in once.items():
        assert twice[name][:5] == pytest.approx(phase[:5])
        assert [k.name for k in twice[name].top] == [k.name for k in phase.top]
        assert [k.ms for k in twice[name].top] == pytest.approx([k.ms for k in phase.top])


def test_a_phase_without_work_is_idle() -> None:
    assert analyse(HOST, [], ["a"])["a"].idle_share == 1
    assert analyse([], WORK, ["a"]) == {}


def test_a_profile_of_a_cpu(tmp_path: Path) -> None:
    x = torch.randn(256, 256)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with record_function("products"):
                for _ in range(3):
                    x = torch.nn.functional.linear(x, x)
            with record_function("python"):
                x.add(1)
                sum(range(10**6))
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = analyse(*read_trace(tmp_path / "trace.json"), ["products", "python"])
    products, python = found["products"], found["python"]
    assert products.top[0].name == "aten::linear"
    assert products.top[0].count == products.launches == 3
    assert python.launches == 1
    assert products.idle_share < 0.5 < python.idle_share
    assert python.gaps[0].host == "python"
    assert python.gaps[0].before == "the end"


def test_work_belongs_to_the_call_that_launched_it(tmp_path: Path) -> None:
    """As a trace with a GPU has it: microseconds, and calls linked by a number."""

    def event(cat: str, name: str, ts: float, dur: float, **args: int) -> str:
        return (
            f'{{"ph": "X", "cat": "{cat}", "name": "{name}", "tid": 1, "ts": {ts}, "dur": {dur}, '
            f'"args": {str(args).replace(chr(39), chr(34))}}}'
        )

    events = [
        event("user_annotation", "phase", 1000, 500),
        event("cpu_op", "aten::mm", 1100, 100),
        event("cuda_runtime", "cudaLaunchKernel", 1150, 10, correlation=7),
        event("kernel", "gemm", 1600, 400, correlation=7),
        event("gpu_memset", "Memset", 1550, 10, correlation=8),  # its call was not recorded
        event("gpu_user_annotation", "phase", 1600, 400),
    ]
    file = tmp_path / "trace.json"
    file.write_text(f'{{"traceEvents": [{", ".join(events)}, {{"ph": "M"}}]}}')
    host, work = read_trace(file)
    assert [r.name for r in host] == ["phase", "aten::mm", "cudaLaunchKernel"]
    assert work[0] == Work("gemm", *map(pytest.approx, (1600e-6, 2000e-6, 1150e-6)))
    assert work[1].launched == work[1].start
    phase = analyse(host, work, ["phase"])["phase"]
    assert phase.wall_ms == pytest.approx(1.0)
    assert phase.busy_ms == pytest.approx(0.4)
