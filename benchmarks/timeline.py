"""Where a device's time goes: what it did, and what the host did while it idled.

A phase has the work that was launched within its range on the host. It lasts from there, or from
the end of the phase before if the device was still at that, until the host has left the range and
the work is done.
"""

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Range(NamedTuple):
    """What the host did: an operation or a named range, in seconds."""

    name: str
    start: float
    stop: float


class Work(NamedTuple):
    """What the device did: a kernel, a copy, a fill, in seconds."""

    name: str
    start: float
    stop: float
    launched: float  # when the host asked for it


class Gap(NamedTuple):
    """The device idled."""

    ms: float
    host: str  # the innermost range on the host in its middle; a phase's name: Python code
    before: str  # the work that ended it


class Kernel(NamedTuple):
    """All work of one name, a step."""

    name: str
    ms: float
    count: float


class Phase(NamedTuple):
    """One phase, on average over the steps."""

    wall_ms: float
    busy_ms: float  # the device did something
    idle_share: float
    launches: float  # by the host; one graph is one launch
    kernels: float
    gaps: list[Gap]  # the largest of all steps
    top: list[Kernel]  # by time


def analyse(
    host: Sequence[Range], work: Sequence[Work], names: Sequence[str], top: int = 8
) -> dict[str, Phase]:
    """Each phase of `names`, which are ranges of the host that follow one another."""
    launched = sorted(work, key=lambda w: w.launched)
    times = [w.launched for w in launched]
    parts: dict[str, list[tuple[float, float, list[Work]]]] = {name: [] for name in names}
    done = float("-inf")
    for phase in sorted((r for r in host if r.name in parts), key=lambda r: r.start):
        own = launched[bisect_left(times, phase.start) : bisect_left(times, phase.stop)]
        begin = max(phase.start, done)
        done = max([phase.stop, *(w.stop for w in own)])
        parts[phase.name].append((begin, done, sorted(own, key=lambda w: w.start)))
    return {name: _phase(steps, host, top) for name, steps in parts.items() if steps}


def _phase(steps: list[tuple[float, float, list[Work]]], host: Sequence[Range], top: int) -> Phase:
    n = len(steps)
    wall = sum(stop - start for start, stop, _ in steps)
    gaps = [gap for step in steps for gap in _gaps(*step)]
    idle = sum(stop - start for start, stop, _ in gaps)
    largest = sorted(gaps, key=lambda gap: gap[0] - gap[1])[:top]
    seconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for _, _, work in steps:
        for w in work:
            seconds[w.name] += w.stop - w.start
            counts[w.name] += 1
    return Phase(
        wall_ms=1000 * wall / n,
        busy_ms=1000 * (wall - idle) / n,
        idle_share=idle / wall if wall else 0.0,
        launches=sum(len({w.launched for w in work}) for _, _, work in steps) / n,
        kernels=counts.total() / n,
        gaps=[
            Gap(1000 * (stop - start), innermost(host, (start + stop) / 2), before)
            for start, stop, before in largest
        ],
        top=[Kernel(k, 1000 * s / n, counts[k] / n) for k, s in seconds.most_common(top)],
    )


def _gaps(start: float, stop: float, work: Sequence[Work]) -> Iterator[tuple[float, float, str]]:
    """(start, stop, name of the next work) of every interval in which no work ran."""
    done = start
    for w in work:
        if w.start > done:
            yield done, w.start, w.name
        done = max(done, w.stop)
    if stop > done:
        yield done, stop, "the end"


def innermost(host: Sequence[Range], time: float) -> str:
    """The range that began last of those that the host was in."""
    inside = [r for r in host if r.start <= time < r.stop]
    return max(inside, key=lambda r: r.start).name if inside else "nothing recorded"


# ---- traces of torch.profiler ----

_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


def read_trace(path: Path) -> tuple[list[Range], list[Work]]:
    """What `export_chrome_trace` wrote; without a GPU the operations are the work."""
    events = [e for e in json.loads(path.read_bytes())["traceEvents"] if e.get("ph") == "X"]
    host = {i: _range(e) for i, e in enumerate(events) if e.get("cat") in _HOST}
    calls = {  # of the runtime, by what links a kernel to the call that launched it
        events[i]["args"]["correlation"]: r.start
        for i, r in host.items()
        if "correlation" in events[i].get("args", {})
    }
    work = []
    for event in events:
        if event.get("cat") in _WORK:
            name, start, stop = _range(event)
            launched = calls.get(event["args"].get("correlation"), start)
            work.append(Work(name, start, stop, launched))
    if not work:
        operations = _outermost(events)
        work = [Work(*host[i], host[i].start) for i in operations]
        host = {i: r for i, r in host.items() if events[i]["cat"] != "cpu_op"}
    return list(host.values()), work


def _range(event: dict) -> Range:
    start = event["ts"] / 1e6  # from µs
    return Range(event["name"], start, start + event["dur"] / 1e6)


def _outermost(events: Sequence[dict]) -> Iterator[int]:
    """Numbers of the operations that ran within no other one."""
    ops = [i for i, e in enumerate(events) if e.get("cat") == "cpu_op"]
    until: dict[int, float] = {}  # by thread
    for i in sorted(ops, key=lambda i: (events[i]["ts"], -events[i]["dur"])):
        start, thread = events[i]["ts"], events[i]["tid"]
        if start >= until.get(thread, start):
            until[thread] = start + events[i]["dur"]
            yield i
