"""The benchmark of a step: everybody does the same work."""

import pytest
import torch

from benchmarks import trainers
from benchmarks.problems import Measured, Problem
from benchmarks.trainers import distiller, full_length, measured
from opcd.passes.plan import Plan
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.protocol import RolloutEngine

PROBLEM = Problem("qwen2.5-tiny", 64, 8, 4, 16, 2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ours() -> Measured:
    return measured("ours", PROBLEM, CPU, torch.float32, [], 2)


def test_all_completions_have_their_full_length(ours: Measured) -> None:
    assert [len(c) for c in ours.completions] == [16] * 4
    assert full_length([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert full_length([1, 2, 3], 2) == [1, 2]


def test_ours_samples_by_the_engine_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def build(name: str, model: torch.nn.Module, batch_size: int, plan: Plan) -> RolloutEngine:
        asked.append((name, batch_size, plan.mode, torch.is_autocast_enabled("cpu")))
        return TransformersEngine(model, batch_size)

    monkeypatch.setattr(trainers, "build_engine", build)
    distiller(PROBLEM, CPU, torch.bfloat16)
    assert asked == [("auto", 4, "packed", True)]


def test_every_phase_is_timed(ours: Measured) -> None:
    assert len(ours.teacher_s) == len(ours.update_s) == len(ours.seconds) == 2
    assert min(*ours.teacher_s, *ours.update_s, ours.rollout_s) > 0
    assert ours.seconds[1] == ours.teacher_s[1] + ours.update_s[1]


def test_a_step_in_bf16_is_that_of_a_run() -> None:
    """Weights are cast, and the head's gradient is added to what is there."""
    _, made, _ = distiller(PROBLEM, CPU, torch.bfloat16)
    assert made.step()["loss"] > 0
    assert made.casts is not None
    assert made.student_loss._options["add_weight_grad"]


def test_what_was_sampled_is_given_again() -> None:
    _, made, recorder = distiller(PROBLEM, CPU, torch.float32)
    recorder.limit = 3
    first, kept = made.rollout(), recorder.kept
    assert all(r.completion_token_ids[:3] == r.completion_token_ids[3:6] for r in kept)
    made.steps_done += 1
    assert made.rollout() != first
    recorder.kept, recorder.replays = kept, True
    assert made.rollout() == first


def test_ours_samples_with_the_engine_of_the_training_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(trainers, "build_engine", lambda name, *_: asked.append(name))
    distiller(PROBLEM, CPU, torch.float32)
    assert asked == ["auto"]


@pytest.mark.parametrize("name", ["trl-sdft", "trl-distillation"])
def test_trl_does_the_same_work(ours: Measured, name: str) -> None:
    pytest.importorskip("trl")
    found = measured(name, PROBLEM, CPU, torch.float32, ours.completions, 2)
    assert found.loss == pytest.approx(ours.loss, rel=1e-4)
    assert found.grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)
    assert len(found.seconds) == 2
    assert min(*found.teacher_s, *found.update_s, found.rollout_s) > 0


def test_micro_batches_shrink_until_they_fit(
    ours: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def train(problem: Problem, *_: object) -> Measured:
        tried.append(problem.micro_batch)
        if problem.micro_batch > 2:
            raise torch.OutOfMemoryError
        return ours._replace(micro_batch=problem.micro_batch)

    monkeypatch.setitem(trainers.TRAINERS, "big", train)
    problem = PROBLEM._replace(micro_batch=8)
    assert measured("big", problem, CPU, torch.float32, [], 2).micro_batch == 2
    assert tried == [8, 4, 2]
