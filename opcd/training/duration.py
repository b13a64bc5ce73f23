"""How long a run will take: what it is made of, timed once each, times how often that comes."""

import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from opcd.evaluation.contenders import LoadedModel
from opcd.evaluation.decoding import greedy_params
from opcd.evaluation.elsewhere import original_side
from opcd.runtime.stopwatch import Stopwatch
from opcd.tasks.prepare import Setup
from opcd.tasks.task import spread
from opcd.training.build import build_distiller
from opcd.training.loop import Distiller
from opcd.training.sources import parted, prompts_of
from opcd.training.validation import Validation

SCRATCH = 2**24  # numbers on which AdamW and writing are timed


class Timed(NamedTuple):
    """Seconds of what a run is made of."""

    # Of a step.
    rollout: float  # the student's own completions
    teacher: float
    update: float  # forward and backward
    optimizer: float
    # Of a request on which models are measured.
    prompted: float  # what the teacher answers behind the context
    shown: float  # what it makes of its answer
    answer: float  # what the student answers
    distances: float  # between the two: a sample of the student's, and both models' passes
    # Of a request elsewhere, by one model.
    elsewhere: float
    # Of a checkpoint that a run continues from.
    checkpoint: float


class RunSeconds(NamedTuple):
    """Seconds of a run's parts, without reading models and writing the one that it ends with."""

    rollouts: float
    guided: float  # completions of the prompted teacher's, made once
    teacher: float
    update: float  # with the optimizer
    validations: float  # with what the prompted teacher answers, made once
    checkpoints: float
    scorecard: float
    elsewhere: float

    @property
    def total(self) -> float:
        """Of the run."""
        return sum(self)

    @property
    def training(self) -> float:
        """Of what max_minutes bounds."""
        return self.total - self.scorecard - self.elsewhere


def expected_seconds(setup: Setup) -> float:
    """What a run will take, by its parts on this machine; its folder stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        # With one step, guided completions are made for no others.
        config = replace(setup.config, output_dir=folder, steps=1)
        aside = setup._replace(config=config)
        distiller = build_distiller(aside)
        try:
            return run_seconds(timed(distiller, aside), setup).total
        finally:
            distiller.engine.close()


def run_seconds(one: Timed, setup: Setup) -> RunSeconds:
    """What a run takes if everything in it takes what it took when it was timed.

    Completions become shorter or longer while a student learns, and what is made of them with them:
    where it first rambles up to max_completion_tokens and then answers in a word, this is too much.
    """
    steps = setup.config.steps
    if minutes := setup.config.max_minutes:  # the step in which the time runs out is the last
        before = range(1, steps)
        steps = 1 + bisect_right(
            before, 60 * minutes, key=lambda steps: _with_steps(steps, one, setup).training
        )
    return _with_steps(steps, one, setup)


def _with_steps(steps: int, one: Timed, setup: Setup) -> RunSeconds:
    """Of a run of so many steps."""
    config, task = setup.config, setup.task
    validated, tested = len(task.validation), len(task.test)

    def reference(requests: int) -> float:
        """Of what the prompted teacher says to them."""
        return one.prompted * requests + one.shown * min(requests, config.divergence_prompts)

    def student(requests: int) -> float:
        """Of what one student says to them."""
        return one.answer * requests + one.distances * min(requests, config.divergence_prompts)

    validations = 1 + -(-steps // config.validate_every)  # before the first step, and at the last
    own_teacher = (config.teacher or config.model) == config.model
    others = 1 if own_teacher else 2  # prompted, beside the teacher: the distilled one, and base
    return RunSeconds(
        rollouts=steps * one.rollout,
        guided=_guided_completions(steps, setup) * one.prompted,
        teacher=steps * one.teacher,
        update=steps * (one.update + one.optimizer),
        validations=reference(validated) + validations * student(validated),
        checkpoints=_checkpoints(steps, setup) * one.checkpoint,
        scorecard=reference(tested) + 2 * student(tested) + others * one.prompted * tested,
        elsewhere=2 * one.elsewhere * len(setup.elsewhere) if tested else 0.0,
    )


def _guided_completions(steps: int, setup: Setup) -> int:
    """How many the teacher writes in so many steps; a prompt that comes again keeps its own."""
    config, conversations = setup.config, setup.task.conversations
    if not config.guided_share or setup.completions is not None:
        return 0
    chosen = (parted(conversations, step, config)[1] for step in range(steps))
    guided = {prompt.key for some in chosen for prompt in prompts_of(some)}
    return len(guided) * config.completions_per_prompt


def _checkpoints(steps: int, setup: Setup) -> int:
    """How many are saved in so many steps."""
    config = setup.config
    often = [config.save_every, *([config.validate_every] if setup.task.validation else [])]
    return len({steps, *(step for every in often for step in range(every, steps, every))})


def timed(distiller: Distiller, setup: Setup) -> Timed:
    """Time each part once on the settings of the run, and leave no trace of it.

    It samples, scores and forms a gradient, which is thrown away: weights, the optimizer's state
    and random numbers stay; AdamW and writing are timed on numbers of their own. Requests are timed
    in one batch of `rollout_batch_size`, spread over the data. What a teacher writes for guided
    prompts is kept, as it is what the step will use.
    """
    rollout, teacher, update = _step_seconds(distiller)
    prompted, shown, answer, distances = _request_seconds(distiller, setup)
    return Timed(
        *(rollout, teacher, update, _optimizer_seconds(distiller)),
        *(prompted, shown, answer, distances, _elsewhere_seconds(distiller, setup)),
        _checkpoint_seconds(distiller),
    )


def _step_seconds(distiller: Distiller) -> list[float]:
    """Of rollout, teacher, forward and backward, in the second of two steps that are the same.

    The first one pays for what a run pays for once: kernels that are compiled, graphs, the
    context's keys and values, the memory of gradients, completions that the teacher writes.
    """
    device = distiller.parameters[0].device
    laps: list[float] = []
    for _ in range(2):
        watch = Stopwatch(device)
        distiller.weights_changed()  # casts are made anew in every step
        watch.mark()
        episodes = distiller.rollout()
        watch.mark()
        targets = distiller.score(episodes)
        watch.mark()
        distiller.backward(episodes, targets)
        watch.mark()
        laps = watch.laps()
        distiller.optimizer.zero_grad(set_to_none=device.type != "cpu")  # as a step does
    distiller.optimizer.zero_grad()
    return laps


def _request_seconds(distiller: Distiller, setup: Setup) -> list[float]:
    """Of the four parts of a request on which models are measured; 0 where a run has none."""
    config, task = setup.config, setup.task
    guided_by_teacher = config.guided_share and setup.completions is None
    if not (task.validation or task.test or guided_by_teacher):
        return [0.0] * 4
    cases = spread(task.validation or task.test or task.training, config.rollout_batch_size)
    some = setup._replace(task=replace(task, validation=cases))
    asked = Validation(distiller, some)
    apart = min(len(cases), config.divergence_prompts)
    parts: list[tuple[Callable[[], object], int]] = [
        (lambda: asked.said, len(cases)),
        (lambda: asked.shown, apart),
        (asked.answers, len(cases)),
        (asked.distances, apart),
    ]
    return [_seconds(part, distiller) / requests for part, requests in parts]


def _elsewhere_seconds(distiller: Distiller, setup: Setup) -> float:
    """Of a request elsewhere: a model's answer, and what it makes of one."""
    requests = spread(setup.elsewhere, setup.config.rollout_batch_size)
    if not (requests and setup.task.test):
        return 0.0
    student, plan = distiller.student, distiller.student_loss.plan
    some = setup._replace(elsewhere=requests)
    model = LoadedModel(student, plan, distiller.engine, some, greedy_params(setup))
    both = _seconds(lambda: distiller.in_low_precision(lambda: original_side(model)), distiller)
    return both / len(requests)


def _optimizer_seconds(distiller: Distiller) -> float:
    """Of a step of AdamW over as many numbers as are trained."""
    trained = sum(p.numel() for p in distiller.parameters)
    like = distiller.parameters[0].detach()
    numbers = torch.nn.Parameter(like.new_zeros(min(SCRATCH, trained)))
    numbers.grad = torch.zeros_like(numbers)
    optimizer = torch.optim.AdamW([numbers], fused=True)
    optimizer.step()  # makes its state
    return _seconds(optimizer.step, distiller) * trained / numbers.numel()


def _checkpoint_seconds(distiller: Distiller) -> float:
    """Of writing what is trained and AdamW's two moments of it, where temporary files go."""
    trained = sum(p.numel() for p in distiller.parameters)
    numbers = torch.zeros(min(SCRATCH, trained))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        torch.save(numbers, Path(folder) / "numbers.pt")
        seconds = time.perf_counter() - begin
    return seconds * 3 * trained / numbers.numel()


def _seconds(function: Callable[[], object], distiller: Distiller) -> float:
    watch = Stopwatch(distiller.parameters[0].device)
    watch.mark()
    function()
    watch.mark()
    (seconds,) = watch.laps()
    return seconds
