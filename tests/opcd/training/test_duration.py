"""What a run is made of, timed without a trace, and what it comes to."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opcd.config import TrainConfig
from opcd.rollouts.choice import build_engine
from opcd.tasks.prepare import Setup, prepare
from opcd.training import duration
from opcd.training.build import build_distiller
from opcd.training.duration import Timed, run_seconds, timed

ONE = Timed(
    rollout=1,
    teacher=2,
    update=3,
    optimizer=4,
    prompted=10,
    shown=20,
    answer=100,
    distances=200,
    elsewhere=1000,
    checkpoint=10_000,
)


def prepared(settings: dict, **overrides: object) -> Setup:
    """Of the tiny task: 12 prompts, 4 a step, 3 validation and 4 test requests."""
    return prepare(TrainConfig(**settings | overrides), for_training=True)


def test_what_is_timed_leaves_no_trace(settings: dict) -> None:
    losses = []
    for looks in (False, True):
        run = f"{settings['output_dir']}-{looks}"
        setup = prepared(settings, output_dir=run, elsewhere_prompts=3, guided_share=0.5)
        distiller = build_distiller(setup)
        before = copy.deepcopy(distiller.student.state_dict())
        random = torch.get_rng_state()
        if looks:
            assert all(seconds > 0 for seconds in timed(distiller, setup))
            assert distiller.steps_done == 0
            assert all(p.grad is None for p in distiller.parameters)
            assert not distiller.optimizer.state
        assert torch.equal(random, torch.get_rng_state())
        for name, tensor in distiller.student.state_dict().items():
            assert torch.equal(tensor, before[name])
        losses.append([distiller.step()["loss"] for _ in range(2)])
    assert losses[0] == losses[1]


def test_each_part_is_timed_by_itself(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves only where completions are sampled and passes are made.

    The two guided completions of the step are no part of its rollout.
    """
    now = [0.0]

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any, **named: Any) -> Any:
            now[0] += seconds
            return function(*arguments, **named)

        return slow

    def teachers_engine(*arguments: Any) -> Any:
        engine = build_engine(*arguments)
        engine.generate = taking(100, engine.generate)
        return engine

    setup = prepared(settings, guided_share=0.5, elsewhere_prompts=5, divergence_prompts=2)
    distiller = build_distiller(setup)
    guided = distiller.source._completions._engine
    guided.generate = taking(100, guided.generate)
    distiller.engine.generate = taking(1, distiller.engine.generate)
    distiller.teacher.score = taking(20, distiller.teacher.score)
    distiller.backward = taking(300, distiller.backward)
    monkeypatch.setattr("opcd.training.guided.build_engine", teachers_engine)
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("opcd.runtime.stopwatch.time", clock)
    assert timed(distiller, setup)._replace(checkpoint=0) == Timed(
        rollout=1,
        teacher=20,
        update=300,
        optimizer=0,
        prompted=100 / 3,
        shown=20 / 2,
        answer=1 / 3,
        distances=(1 + 20) / 2,
        elsewhere=1 / 5,
        checkpoint=0,
    )


def test_a_run_is_the_sum_of_its_parts(settings: dict) -> None:
    setup = prepared(settings, elsewhere_prompts=5)
    found = run_seconds(ONE, setup)
    answered, told_apart = 10 + 20, 100 + 200  # by the prompted teacher, by a student
    assert found._asdict() == {
        "rollouts": 6 * 1,
        "guided": 0,
        "teacher": 6 * 2,
        "update": 6 * (3 + 4),
        "validations": 3 * answered + 3 * 3 * told_apart,  # before step 1, after 3 and 6
        "checkpoints": 4 * 10_000,  # after 2, 3, 4 and 6
        "scorecard": 4 * answered + 2 * 4 * told_apart + 4 * 10,  # the distilled one, prompted
        "elsewhere": 2 * 5 * 1000,
    }
    assert found.total == sum(found)


def test_what_a_run_does_not_do_takes_no_time(settings: dict) -> None:
    alone = prepared(settings, elsewhere_prompts=5, validation_data=None, test_data=None)
    found = run_seconds(ONE, alone)
    assert (found.validations, found.scorecard, found.elsewhere) == (0, 0, 0)
    assert found.checkpoints == 3 * 10_000


def test_distances_are_measured_on_fewer_requests(settings: dict) -> None:
    found = run_seconds(ONE, prepared(settings, divergence_prompts=2, steps=7))
    before_and_after = 4  # 3, 6, and the last step
    assert found.validations == 3 * 10 + 2 * 20 + before_and_after * (3 * 100 + 2 * 200)
    assert found.scorecard == 4 * 10 + 2 * 20 + 2 * (4 * 100 + 2 * 200) + 4 * 10


def test_with_another_teacher_base_answers_behind_the_context_as_well(settings: dict) -> None:
    setup = prepared(settings)
    another = setup._replace(config=replace(setup.config, teacher="another"))
    assert run_seconds(ONE, another).scorecard - run_seconds(ONE, setup).scorecard == 4 * 10


@pytest.mark.parametrize(
    ("share", "steps", "prompts"), [(0.5, 3, 6), (1.0, 3, 12), (1.0, 60, 12), (0.25, 1, 1)]
)
def test_a_prompt_is_guided_once(settings: dict, share: float, steps: int, prompts: int) -> None:
    """Three steps are an epoch; in later ones its completions are there."""
    setup = prepared(settings, guided_share=share, steps=steps, completions_per_prompt=2)
    assert run_seconds(ONE, setup).guided == prompts * 2 * 10
    from_a_file = setup._replace(completions={})
    assert run_seconds(ONE, from_a_file).guided == 0


@pytest.mark.parametrize(("minutes", "steps"), [(1e-6, 1), (2.5, 3), (5.9, 6), (100.0, 6)])
def test_max_minutes_ends_training_and_not_the_scorecard(
    settings: dict, minutes: float, steps: int
) -> None:
    """The step that is under way is done."""
    one = Timed(60, *[0] * 5, answer=7, distances=0, elsewhere=0, checkpoint=0)
    setup = prepared(settings, max_minutes=minutes, validation_data=None)
    found = run_seconds(one, setup)
    assert (found.rollouts, found.scorecard) == (60 * steps, 2 * 4 * 7)


def test_a_look_is_at_one_step_in_a_folder_aside(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Setup] = []
    closed: list[bool] = []
    engine = SimpleNamespace(close=lambda: closed.append(True))
    build = lambda setup: seen.append(setup) or SimpleNamespace(engine=engine)  # noqa: E731
    monkeypatch.setattr(duration, "build_distiller", build)
    monkeypatch.setattr(duration, "timed", lambda *_: ONE)
    setup = prepared(settings)
    assert duration.expected_seconds(setup) == run_seconds(ONE, setup).total
    (aside,) = seen
    assert aside.config.steps == 1
    assert aside.config.output_dir != settings["output_dir"]
    assert not Path(aside.config.output_dir).exists()
    assert closed == [True]
