"""A whole training step, phase by phase: ours and TRL 1.16's trainers on the same work.

The student completes short prompts, the frozen teacher scores the completions behind a long
context, the student takes one AdamW step on the reverse KL over the whole vocabulary. The row's
time is that of teacher and update together, on the same completions for everybody; the rollout
(by each trainer's own sampling, as many tokens) is timed apart, and `step_s` is the sum. A trainer
is timed only if loss and gradient norm of the initial weights are those of ours.

    ours               the context's keys and values computed once, before the first step; rollouts
                       by the engine that `auto` takes
    trl-sdft           SDFTTrainer, which does exactly this, with full logits
    trl-distillation   TRL's fastest loss, the context put in front of its teacher's rows

TRL needs the packages trl==1.16.0, datasets>=4.7, accelerate>=1.10.1, pandas>=2.1.1, pyarrow>=21
and jinja2; without them its rows are skipped. Nothing is fetched: SmolLM2 has random weights of its
shape where its own are not in the cache, and token ids are random. Teacher means its passes below
the head; what is left of a step is the update.

`…floor_s` is what `floors.phases` counts for a phase, at the rates that `rates.py` measured in the
same process, and `…floor_share` that over the phase's time; `sheet_floor_share` is that of the
whole step at the rates of the device's data sheet. Nobody attends by cuDNN (`conftest.py`).
"""

from functools import cache
from statistics import median

import pytest
import torch

from benchmarks import floors, rates
from benchmarks.problems import SMOLLM2, Measured, Problem
from benchmarks.providers import Unavailable
from benchmarks.rounds import Rounds
from benchmarks.trainers import TRAINERS, measured
from opcd.models.by_name import resolve_device, resolve_dtype

DEVICE = resolve_device("auto")
DTYPE = resolve_dtype("auto", DEVICE)
ON_GPU = DEVICE.type == "cuda"
# context, prompt, completions, completion, micro batch
PROBLEMS = (
    [Problem(SMOLLM2, 2048, 64, 64, 256, 16), Problem("qwen2.5-1.5b", 2048, 64, 64, 256, 16)]
    if ON_GPU
    else [Problem("qwen2.5-tiny", 256, 16, 8, 32, 4), Problem(SMOLLM2, 512, 16, 4, 16, 2)]
)
ROUNDS = 5 if ON_GPU else 3
TOLERANCE = 0.02 if torch.bfloat16 == DTYPE else 1e-3  # of loss and gradient norm


@cache
def ours(problem: Problem) -> Measured:
    return measured("ours", problem, DEVICE, DTYPE, [], ROUNDS)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.model)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_step(benchmark: Rounds, trainer: str, problem: Problem) -> None:
    baseline = ours(problem)
    try:
        found = baseline
        if trainer != "ours":
            found = measured(trainer, problem, DEVICE, DTYPE, baseline.completions, ROUNDS)
    except Unavailable as reason:
        pytest.skip(str(reason))
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    loss = abs(found.loss / baseline.loss - 1)
    grad_norm = abs(found.grad_norm / baseline.grad_norm - 1)
    assert max(loss, grad_norm) < TOLERANCE, f"another problem: {found.loss} for {baseline.loss}"
    benchmark.given(found.seconds)
    seconds, own = median(found.seconds), median(baseline.seconds)
    benchmark.facts |= {
        "question": "step",
        "provider": trainer,
        "model": found.model,
        "P": problem.context,
        "B": problem.completions,
        "prompt": problem.prompt,
        "completion": problem.completion,
        "micro_batch": found.micro_batch,
        "dtype": str(DTYPE).removeprefix("torch."),
        "teacher": found.teacher,
        "rollout_s": rounded(found.rollout_s),
        "teacher_s": rounded(median(found.teacher_s)),
        "update_s": rounded(median(found.update_s)),
        "step_s": rounded(found.rollout_s + seconds),
        **floor_facts(problem, found),
        "loss": rounded(found.loss),
        "loss_difference": float(f"{loss:.1g}"),
        "grad_norm_difference": float(f"{grad_norm:.1g}"),
        "peak_mib": None if found.peak_mib is None else round(found.peak_mib),
        "times_ours": round(seconds / own, 2),
    }


def floor_facts(problem: Problem, found: Measured) -> dict[str, float | None]:
    """The floor of each phase and of the step, and their shares of what they took."""
    took = {
        "rollout": found.rollout_s,
        "teacher": median(found.teacher_s),
        "update": median(found.update_s),
    }
    parts = floors.phases(problem, found.sizes, DTYPE.itemsize)
    here, sheet = rates.measured(DEVICE), rates.sheet(DEVICE)
    floor = {phase: floors.floor_s(work, here) for phase, work in parts.items()}
    took["step"], floor["step"] = sum(took.values()), sum(floor.values())
    promised = sheet and sum(floors.floor_s(work, sheet) for work in parts.values())
    return {
        **{f"{phase}_floor_s": rounded(x) for phase, x in floor.items()},
        **{f"{phase}_floor_share": round(x / took[phase], 3) for phase, x in floor.items()},
        "sheet_floor_share": promised and round(promised / took["step"], 3),
    }


def rounded(x: float) -> float:
    return float(f"{x:.4g}")
