"""What the device does in a training step, and what the host does while it idles.

    python -m benchmarks.profile_step                     # all models, prints the tables
    python -m benchmarks.profile_step --model qwen2.5-1.5b
    python -m benchmarks.profile_step --save NAME         # keeps results/profile-NAME.json
    python -m benchmarks.profile_step --json FILE         # or any file

The steps are those of `bench_step.py` (ours), under torch.profiler, which slows the host: shares
and gaps say where to look, times are for the benchmark. Of each rollout only `ROLLOUT_TOKENS` are
sampled, as every token's work is the same; the other phases have the full completions. Without a
GPU the outermost operations of the CPU stand for the device's work.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.bench_step import DEVICE, DTYPE, PROBLEMS
from benchmarks.problems import Problem
from benchmarks.rows import RESULTS, device_name, origin, write
from benchmarks.timeline import Phase, Range, Work, analyse, read_trace
from benchmarks.trainers import distiller, free
from opcd.training.loop import Distiller

PHASES = {"rollout": "rollout", "score": "teacher", "update": "update"}  # method: name
ROLLOUT_TOKENS = 32
STEPS = 2


def name_phases(made: Distiller) -> None:
    """Each phase's method becomes a range of its name."""
    for method, name in PHASES.items():
        setattr(made, method, record_function(name)(getattr(made, method)))


def trace(problem: Problem, device: torch.device, dtype: torch.dtype) -> tuple[
    str, list[Range], list[Work]
]:  # fmt: skip
    """The model's name, and what host and device did in a few steps behind a first one."""
    name, made, recorder = distiller(problem, device, dtype)
    name_phases(made)
    recorder.limit = ROLLOUT_TOKENS
    made.step()
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            made.step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return name, *read_trace(file)


def table(title: str, phases: dict[str, Phase]) -> str:
    lines = [title, f"{'':9}{'wall ms':>9}{'busy ms':>9}{'idle':>7}{'launches':>10}{'kernels':>9}"]
    lines += [
        f"{name:9}{p.wall_ms:9.2f}{p.busy_ms:9.2f}{p.idle_share:7.1%}{p.launches:10.0f}"
        f"{p.kernels:9.0f}"
        for name, p in phases.items()
    ]
    for name, phase in phases.items():
        lines += ["", f"{name}: largest gaps (ms, on the host, before)"]
        lines += [f"{g.ms:9.3f}  {g.host[:45]:45}  {g.before[:45]}" for g in phase.gaps]
        lines += [f"{name}: most time (ms and number a step)"]
        lines += [f"{k.ms:9.3f}  {k.count:8.0f}  {k.name[:80]}" for k in phase.top]
    return "\n".join(lines)


def rounded(x: object) -> object:
    """Four digits of every number, for a file."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, (list, tuple)):
        fields = getattr(x, "_fields", None)
        values = [rounded(y) for y in x]
        return dict(zip(fields, values, strict=True)) if fields else values
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[p.model for p in PROBLEMS], help="default: all")
    parser.add_argument("--save", metavar="NAME", help="keep the tables in results/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep them elsewhere")
    arguments = parser.parse_args()
    rows = []
    for problem in PROBLEMS:
        if arguments.model not in (None, problem.model):
            continue
        name, host, work = trace(problem, DEVICE, DTYPE)
        phases = analyse(host, work, list(PHASES.values()))
        print(table(f"{name}, {DTYPE}, {device_name()}", phases), end="\n\n")
        facts = {**problem._asdict(), "model": name}
        facts |= {"dtype": str(DTYPE).removeprefix("torch."), "rollout_tokens": ROLLOUT_TOKENS}
        rows.append(facts | {phase: rounded(found) for phase, found in phases.items()})
        del host, work
        free(DEVICE)
    file = RESULTS / f"profile-{arguments.save}.json" if arguments.save else arguments.json
    if file:
        shared = origin()
        write(({**shared, **row} for row in rows), file)
        print(f"written: {file}")


if __name__ == "__main__":
    main()
