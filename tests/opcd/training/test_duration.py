"""One step timed, and nothing of it left behind."""

import copy

import pytest
import torch

from opcd.config import TrainConfig
from opcd.tasks.prepare import prepare
from opcd.training.build import build_distiller
from opcd.training.duration import StepSeconds, run_seconds, step_seconds


def test_a_timed_step_leaves_no_trace(settings: dict) -> None:
    losses = []
    for timed in (False, True):
        setup = prepare(TrainConfig(**settings), for_training=True)
        distiller = build_distiller(setup)
        before = copy.deepcopy(distiller.student.state_dict())
        random = torch.get_rng_state()
        if timed:
            step = step_seconds(distiller, setup)
            assert all(x > 0 for x in (step.rollout, step.teacher, step.update, step.optimizer))
            assert distiller.steps_done == 0
            assert all(p.grad is None for p in distiller.parameters)
            assert not distiller.optimizer.state
        assert torch.equal(random, torch.get_rng_state())
        for name, tensor in distiller.student.state_dict().items():
            assert torch.equal(tensor, before[name])
        losses.append([distiller.step()["loss"] for _ in range(3)])
    assert losses[0] == losses[1]


def test_a_run_is_as_many_steps_validations_and_answers(settings: dict) -> None:
    setup = prepare(TrainConfig(**settings), for_training=True)
    step = StepSeconds(1.0, 2.0, 3.0, 4.0, completions=4, a_completion=0.1)
    found = run_seconds(step, setup)
    assert found.steps == 6 * 10
    answers = 1 - 0.1  # three of the four that a step samples
    assert found.validations == pytest.approx(2 * (2 * answers + 3 * 3 / 4))
    assert found.scorecard == pytest.approx(2 * (3 * 1.0 + 3 * 4 / 4))
    assert found.total == pytest.approx(sum(found))
