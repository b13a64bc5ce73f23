"""Everyone who trains by this method: the same models, the same prompts, the same completions.

A trainer takes steps of on-policy context distillation on a `Problem` and tells how long each phase
took: the first step warms up and gives loss and gradient norm of the initial weights. One that a
machine cannot run says why in `Unavailable`.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.memory import peak_mib
from benchmarks.problems import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Measured,
    Problem,
    TokenIds,
    models,
    sizes_of,
    tokens,
)
from benchmarks.providers import Unavailable
from opcd.config import TrainConfig
from opcd.episodes import Episode, Prompt
from opcd.models.head import head_of
from opcd.models.lm import autocast
from opcd.passes.plan import find_plan
from opcd.rollouts.choice import build_engine
from opcd.rollouts.protocol import Rollout, RolloutEngine, SamplingParams, complete
from opcd.student_loss import StudentLoss
from opcd.teacher import ONLY, SharedPrefixTeacher
from opcd.training.loop import Distiller
from opcd.training.sources import Source

# problem, device, dtype of the arithmetic, the completions to train on, steps to time
Trainer = Callable[[Problem, torch.device, torch.dtype, TokenIds, int], Measured]


def full_length(completion: Sequence[int], length: int) -> list[int]:
    """A completion that ended early goes on with itself: no row of anybody needs a mask."""
    return (list(completion) * math.ceil(length / len(completion)))[:length]


class Recorder:
    """An engine that keeps what another one sampled, to give it again."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self.kept: list[Rollout] = []
        self.replays = False
        self.limit: int | None = None  # tokens that are sampled of each completion

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        streams: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """See RolloutEngine.generate; completions have the full length."""
        length = params.max_completion_tokens
        if not self.replays:
            params = replace(params, max_completion_tokens=min(length, self.limit or length))
            self.kept = [
                replace(r, completion_token_ids=full_length(r.completion_token_ids, length))
                for r in self._engine.generate(prompts, params, streams)
            ]
        return self.kept

    def sync(self, student: torch.nn.Module, version: int) -> None:
        """See RolloutEngine.sync."""
        self._engine.sync(student, version)

    def close(self) -> None:
        """See RolloutEngine.close."""
        self._engine.close()


class SamePrompts(Source):
    """A source whose every step has the same prompts, in the same order."""

    def __init__(self, prompts: list[Prompt], config: TrainConfig) -> None:
        self._prompts = prompts
        self._params = SamplingParams(config.max_completion_tokens, config.temperature)

    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        """See Source.episodes."""
        return complete(sampler, self._prompts, self._params, seed=0, step=step)


def distiller(
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    shared: bool = True,  # whether the teacher computes the context once
) -> tuple[str, Distiller, Recorder]:
    """Ours, ready for its first step, with the name of its model."""
    context, prompt_ids = tokens(problem)
    name, student, teacher_model = models(problem.model, device, dtype)
    config = TrainConfig(
        output_dir="none",
        context="none",
        prompts="none",
        max_completion_tokens=problem.completion,
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        max_tokens_per_pass=problem.micro_batch * (problem.prompt + problem.completion),
        rollout_batch_size=problem.completions,
    ).check()
    new = problem.prompt + problem.completion + (0 if shared else problem.context)
    teacher = SharedPrefixTeacher(teacher_model, context, problem.micro_batch * new, shared=shared)
    plan = teacher.plan if shared else find_plan(teacher_model, context)
    with autocast(device, dtype):
        engine = build_engine(config.rollout_engine, student, config.rollout_batch_size, plan)
    recorder = Recorder(engine)
    source = SamePrompts([Prompt(ids, ids, ONLY) for ids in prompt_ids], config)
    # As a run has it; its head is measured here, before weights are cast for a pass.
    trained = head_of(student).weight.requires_grad
    loss = StudentLoss(student, plan, add_weight_grad=trained)
    return name, Distiller(loss, teacher, recorder, source, config, dtype), recorder


def ours(
    problem: Problem,
    device: torch.device,
    dtype: torch.dtype,
    _: TokenIds,
    rounds: int,
    shared: bool = True,
) -> Measured:
    """The training loop as it is; the completions are its own, of its first step."""
    name, made, recorder = distiller(problem, device, dtype, shared)
    first = made.step()
    kept = recorder.kept
    sampled = made.step()
    recorder.kept, recorder.replays = kept, True
    steps = [made.step() for _ in range(rounds)]
    return Measured(
        name,
        first["loss"],
        first["grad_norm"],
        [r.completion_token_ids for r in kept],
        sampled["rollout_time_s"],
        [s["teacher_time_s"] for s in steps],
        [s["update_time_s"] for s in steps],
        problem.micro_batch,
        f"{made.teacher.plan.mode}, {made.teacher.plan.backend}",
        sizes_of(made.student),
    )


def trl(kind: str) -> Trainer:
    """One of TRL's trainers, where TRL is installed."""

    def run(problem: Problem, *args: Any) -> Measured:
        try:
            from benchmarks.trl_trainers import measure
        except ModuleNotFoundError as error:
            raise Unavailable(f"{error.name} is not installed") from error
        return measure(kind, problem, *args)

    return run


TRAINERS: dict[str, Trainer] = {
    "ours": ours,
    "trl-sdft": trl("sdft"),
    "trl-distillation": trl("distillation"),
}


def measured(name: str, problem: Problem, device: torch.device, *args: Any) -> Measured:
    """What the trainer did, in the largest micro batches, up to the problem's, that fit."""
    try:
        return _attempt(TRAINERS[name], problem, device, *args)
    except torch.OutOfMemoryError:
        if problem.micro_batch == 1:
            raise
    finally:
        free(device)
    smaller = problem._replace(micro_batch=problem.micro_batch // 2)
    return measured(name, smaller, device, *args)


def _attempt(train: Trainer, problem: Problem, device: torch.device, *args: Any) -> Measured:
    results: list[Measured] = []
    peak = peak_mib(device, lambda: results.append(train(problem, device, *args)))
    return results[0]._replace(peak_mib=peak)


def free(device: torch.device) -> None:
    """Give back what the trainer before held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
