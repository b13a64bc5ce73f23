"""Hidden states of a real run, for the benchmarks of the loss.

    python -m benchmarks.hidden_states FILE --config examples/voice_assistant/config.yaml

trains by the file of settings, as `opcd train` does, but writes no run: FILE (.safetensors) gets,
before step 0 and after 50 steps (`--steps`), what both models' heads are given for the scored
tokens of the step that follows, and both heads, in bf16. It holds a model's weights, so it lies
outside of this repository. Then

    make bench ARGS="--hidden FILE -k step"

has cases of these tensors beside those of Gaussian ones. Real hidden states have directions of very
different size, and after fifty steps student and teacher are as near as training brings them.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.providers import Inputs
from benchmarks.rows import commit
from opcd.config.settings import gather
from opcd.models.head import head_of
from opcd.passes.hidden import Row
from opcd.passes.plan import planned_hidden
from opcd.runtime.batches import batches_by_tokens
from opcd.tasks.prepare import prepare
from opcd.training.build import build_distiller
from opcd.training.loop import Distiller

ROOT = Path(__file__).parents[1]
STEPS = (0, 50)
NAMES = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")


def recorded_steps(file: Path | None) -> dict[str, tuple[int, int, int]]:
    """N, D and V of "step 50" and the like; nothing of no file."""
    if file is None:
        return {}
    with safe_open(file, "pt") as held:
        found = {}
        for step in (held.metadata() or {})["steps"].split():
            n, d = held.get_slice(f"{step}.{NAMES[0]}").get_shape()
            v, _ = held.get_slice(f"{step}.{NAMES[1]}").get_shape()
            found[f"step {step}"] = (n, d, v)
    return found


def recorded(file: Path, step: str, device: torch.device) -> Inputs:
    """What is held of "step 50": (N, D) and (V, D) of the student, and of the teacher."""
    number = step.removeprefix("step ")
    with safe_open(file, "pt", device=str(device)) as held:
        h_s, w_s, h_t, w_t = (held.get_tensor(f"{number}.{name}") for name in NAMES)
    return h_s, w_s, h_t, w_t


def scored(made: Distiller) -> list[Tensor]:
    """Of the next step, as NAMES has them."""
    episodes = made.rollout()
    targets = made.score(episodes)
    rows = [Row(e.student_ids, e.student_spans) for e in episodes]
    lengths = [len(row.token_ids) for row in rows]
    batches = list(batches_by_tokens(lengths, made.config.max_tokens_per_pass))

    def passes() -> list[Tensor]:
        plan = made.student_loss.plan
        return [planned_hidden(made.student, [rows[i] for i in b], plan) for b in batches]

    teacher = [targets.of(batch).hidden for batch in batches]
    found = [torch.cat(made.in_low_precision(passes)), head_of(made.student).weight]
    found += [torch.cat(teacher), targets.head.weight]
    # A copy of each: the weights go on being trained, and no two may share memory in the file.
    return [x.detach().to("cpu", torch.bfloat16, copy=True).contiguous() for x in found]


def record(
    settings: dict[str, Any], config: Path | None, steps: Sequence[int]
) -> dict[str, Tensor]:
    """Train as far as the last of the steps; what stands before each of them."""
    made = build_distiller(prepare(gather(settings, config), for_training=True))
    kept = {}
    for step in range(max(steps) + 1):
        if step in steps:
            named = zip(NAMES, scored(made), strict=True)
            kept |= {f"{step}.{name}": tensor for name, tensor in named}
        if step < max(steps):
            made.step()
    return kept


def outside(argument: str) -> Path:
    """A file that may hold weights: a type for argparse."""
    file = Path(argument).resolve()
    if file.is_relative_to(ROOT) or file.suffix != ".safetensors":
        raise argparse.ArgumentTypeError(
            f"must be a .safetensors outside of {ROOT}, as it holds weights, got {file}; "
            f"pass one like ~/hidden.safetensors"
        )
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=outside, help="where to put them")
    parser.add_argument("--config", type=Path, required=True, help="as of opcd train")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, metavar="STEP")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # for what the teacher writes
        kept = record({"output_dir": folder}, args.config, args.steps)
    steps = sorted(set(args.steps))
    about = {"steps": " ".join(map(str, steps)), "config": args.config.name, "commit": commit()}
    save_file(kept, args.file, metadata=about)
    for step, (n, d, v) in recorded_steps(args.file).items():
        print(f"{step}: {n} tokens, D {d}, V {v}")
    print(f"written: {args.file}")


if __name__ == "__main__":
    main()
