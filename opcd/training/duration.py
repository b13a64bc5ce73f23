"""How long a run will take, from one step of it."""

import tempfile
from dataclasses import replace
from typing import NamedTuple

import torch

from opcd.rollouts.protocol import SamplingParams, complete
from opcd.runtime.stopwatch import Stopwatch
from opcd.tasks.order import step_prompts
from opcd.tasks.prepare import Setup
from opcd.training.build import build_distiller
from opcd.training.loop import Distiller

MORE = 4  # times a step's completions: what more of them in a call cost
SCRATCH = 2**24  # numbers on which AdamW is timed


class StepSeconds(NamedTuple):
    """Seconds of a step's parts, and of sampling in general."""

    rollout: float
    teacher: float
    update: float  # forward and backward
    optimizer: float
    completions: int  # of the step
    a_completion: float  # of one more in a call that samples

    @property
    def total(self) -> float:
        """Of the step."""
        return self.rollout + self.teacher + self.update + self.optimizer

    def sampling(self, completions: int) -> float:
        """Of a call that samples so many."""
        return self.rollout + self.a_completion * (completions - self.completions)


class RunSeconds(NamedTuple):
    """Seconds of a run's parts, without reading and writing models."""

    steps: float
    validations: float
    scorecard: float

    @property
    def total(self) -> float:
        """Of the run."""
        return sum(self)


def step_seconds(distiller: Distiller, setup: Setup) -> StepSeconds:
    """Time the step that comes next, on the settings of the run, and leave no trace of it.

    It samples, scores and forms a gradient, which is thrown away: weights, the optimizer's state
    and random numbers stay, and AdamW is timed on numbers of its own. What a teacher writes for
    guided prompts is kept, as it is what the step will use.
    """
    config, device = distiller.config, distiller.parameters[0].device
    watch = Stopwatch(device)
    distiller.weights_changed()  # casts are made anew in every step
    watch.mark()
    episodes = distiller.rollout()
    watch.mark()
    targets = distiller.score(episodes)
    watch.mark()
    distiller.backward(episodes, targets)
    watch.mark()
    distiller.optimizer.zero_grad()
    rollout, teacher, update = watch.laps()
    prompts = step_prompts(setup.task.train, distiller.steps_done, config) * MORE
    params = SamplingParams(config.max_completion_tokens, config.temperature)
    watch.mark()
    distiller.in_low_precision(
        lambda: complete(distiller.engine, prompts, params, config.seed, distiller.steps_done)
    )
    watch.mark()
    (more,) = watch.laps()
    a_completion = max(0.0, more - rollout) / max(1, len(prompts) - len(episodes))
    optimizer = _optimizer_seconds(distiller, watch)
    return StepSeconds(rollout, teacher, update, optimizer, len(episodes), a_completion)


def run_seconds(step: StepSeconds, setup: Setup) -> RunSeconds:
    """What a run takes if all its steps are like that one.

    Completions become shorter or longer while a student learns, and the steps with them: where it
    first rambles up to max_completion_tokens and then answers in a word, this is too much.
    """
    config, task = setup.config, setup.task

    def scored(prompts: int) -> float:
        """Of sampling completions, and both models' passes over them."""
        passes = (step.teacher + step.update / 3) * prompts / step.completions
        return step.sampling(prompts) + passes

    validations = 0.0
    if task.validation:
        held_out = min(len(task.validation), config.divergence_prompts)
        validation = step.sampling(len(task.validation)) + scored(held_out)
        validations = -(-config.steps // config.validate_every) * validation
    scorecard = 0.0
    if task.test:
        held_out = min(len(task.test), config.divergence_prompts)
        scorecard = 2 * (2 * step.sampling(len(task.test)) + scored(held_out))
    return RunSeconds(config.steps * step.total, validations, scorecard)


def _optimizer_seconds(distiller: Distiller, watch: Stopwatch) -> float:
    """Of a step of AdamW over as many numbers as are trained."""
    trained = sum(p.numel() for p in distiller.parameters)
    like = distiller.parameters[0].detach()
    numbers = torch.nn.Parameter(like.new_zeros(min(SCRATCH, trained)))
    numbers.grad = torch.zeros_like(numbers)
    optimizer = torch.optim.AdamW([numbers], fused=True)
    optimizer.step()  # makes its state
    watch.mark()
    optimizer.step()
    watch.mark()
    (seconds,) = watch.laps()
    return seconds * trained / numbers.numel()


def expected_seconds(setup: Setup) -> float:
    """What a run will take, by one step of it on this machine; its folder stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        aside = setup._replace(config=replace(setup.config, output_dir=folder))
        distiller = build_distiller(aside)
        try:
            return run_seconds(step_seconds(distiller, aside), aside).total
        finally:
            distiller.engine.close()
