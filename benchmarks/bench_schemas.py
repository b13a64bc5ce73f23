"""A whole training step behind tool schemas: 1,500 tokens in front of the teacher's prompts.

    ours       the schemas' keys and values computed once, before the first step
    in-full    the same step with a teacher that computes them with every sequence

SmolLM2-135M, with its own weights where they are at hand. Only the number of tokens matters: they
are random. Prompts and completions are those of calls of tools: a request, and a call. The row's
time is that of teacher and update together, on the same completions; `step_s` has the rollout too.
"""

from functools import cache
from statistics import median

import pytest
import torch

from benchmarks.bench_step import DEVICE, DTYPE, ON_GPU, ROUNDS, TOLERANCE, rounded
from benchmarks.problems import SMOLLM2, Measured, Problem
from benchmarks.rounds import Rounds
from benchmarks.trainers import free, ours

# context, prompt, completions, completion, micro batch
PROBLEM = Problem(SMOLLM2, 1500, 40, 64 if ON_GPU else 8, 48, 16 if ON_GPU else 4)
PROVIDERS = {"ours": True, "in-full": False}


@cache
def step(shared: bool) -> Measured:
    try:
        return ours(PROBLEM, DEVICE, DTYPE, [], ROUNDS, shared)
    finally:
        free(DEVICE)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_schemas(benchmark: Rounds, provider: str) -> None:
    try:
        found, baseline = step(PROVIDERS[provider]), step(True)
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    loss = abs(found.loss / baseline.loss - 1)
    assert loss < TOLERANCE, f"another problem: {found.loss} for {baseline.loss}"
    benchmark.given(found.seconds)
    seconds, own = median(found.seconds), median(baseline.seconds)
    benchmark.facts |= {
        "question": "schemas",
        "provider": provider,
        "model": found.model,
        "P": PROBLEM.context,
        "B": PROBLEM.completions,
        "prompt": PROBLEM.prompt,
        "completion": PROBLEM.completion,
        "micro_batch": found.micro_batch,
        "dtype": str(DTYPE).removeprefix("torch."),
        "teacher": found.teacher,
        "rollout_s": rounded(found.rollout_s),
        "teacher_s": rounded(median(found.teacher_s)),
        "update_s": rounded(median(found.update_s)),
        "step_s": rounded(found.rollout_s + seconds),
        "loss_difference": float(f"{loss:.1g}"),
        "times_ours": round(seconds / own, 2),
    }
