"""What a run measures of its student on the validation requests, before and while it trains."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

import torch

from opcd.evaluation.agreement import (
    Side,
    divergences,
    gap_between,
    own_side,
    student_side,
    teacher_side,
)
from opcd.evaluation.contenders import Answer, greedy_answers, prompted_answers
from opcd.evaluation.evaluate import episodes_of
from opcd.evaluation.scorecard import accuracy
from opcd.models.lm import causal_lm
from opcd.rollouts.choice import build_engine
from opcd.tasks.prepare import Setup
from opcd.tasks.task import spread
from opcd.training.loop import Distiller


class _Reference(NamedTuple):
    """What the prompted teacher says to the requests, and thinks of some of it."""

    answers: list[Answer]  # to all of them
    side: Side  # of its answers to those on which divergences are measured


class Validation:
    """Measures a student, without the context, against what the prompted teacher says.

    The teacher is frozen, so its answers are made once, when they are first needed.
    """

    def __init__(self, distiller: Distiller, setup: Setup) -> None:
        self._distiller = distiller
        self._setup = setup
        self._cases = setup.task.validation
        self._held_out = spread(self._cases, setup.config.divergence_prompts)

    def measure(self) -> dict[str, Any]:
        """Accuracy where it can be judged, agreement with the teacher, both divergences, and time.

        gap: nats a token that the student misses on the teacher's own answers: behaviour that it
            does not show. It says more than the divergence on the student's samples, which is as
            low for a student that has settled on one of two behaviours.
        """
        begin = time.perf_counter()
        distiller, setup, reference = self._distiller, self._setup, self._reference
        student, engine, plan = distiller.student, distiller.engine, distiller.student_loss.plan
        config = setup.config
        engine.sync(student, distiller.steps_done)

        def of_student() -> tuple[list[Answer], Side, Side]:
            answers = greedy_answers(engine, [c.prompt.student_ids for c in self._cases], setup)
            own = own_side(student, plan, engine, [c.prompt for c in self._held_out], config)
            return answers, own, student_side(student, plan, reference.side.episodes, config)

        answers, own, shown = distiller.in_low_precision(of_student)
        apart = divergences(own, teacher_side(distiller.teacher, own.episodes), config.temperature)
        gap = gap_between(shown, reference.side, config.temperature)
        same = [a.text == b.text for a, b in zip(answers, reference.answers, strict=True)]
        return {
            **self._accuracy(answers),
            "gap": gap.nats.mean,
            "top1_agreement": gap.likeliest.mean,
            "greedy_agreement": fmean(same),
            "divergence": apart.reverse_kl.mean,
            "forward_kl": apart.forward_kl.mean,
            "student_entropy": apart.student_entropy.mean,
            "teacher_entropy": apart.teacher_entropy.mean,
            **_shares(answers),
            "prompted": {**self._accuracy(reference.answers), **_shares(reference.answers)},
            "time_s": time.perf_counter() - begin,
        }

    def _accuracy(self, answers: Sequence[Answer]) -> dict[str, float]:
        task = self._setup.task
        if not task.judges(self._cases):
            return {}
        theirs = [answer.text for answer in self._reference.answers]
        right = accuracy(answers, self._cases, task.scorer, theirs)
        return {"accuracy": right, "n": len(self._cases)}

    @cached_property
    def _reference(self) -> _Reference:
        teacher, config = self._distiller.teacher, self._setup.config
        device = causal_lm(teacher.model).device
        with teacher.frozen(), torch.autocast(device.type, enabled=False):
            size = config.rollout_batch_size
            engine = build_engine(config.rollout_engine, teacher.model, size, teacher.plan)
            answers = prompted_answers(engine, self._cases, self._setup)
            engine.close()
        episodes = episodes_of(self._cases, answers, self._held_out)
        return _Reference(answers, teacher_side(teacher, episodes))


def rank(found: dict[str, Any]) -> tuple[float, float]:
    """What makes one validation better than another: accuracy, then the gap; without it the gap.

    Those of versions before hold no gap, and are the worse one where accuracies are equal.
    """
    return found.get("accuracy", 0.0), -found.get("gap", math.inf)


def _shares(answers: Sequence[Answer]) -> dict[str, float]:
    """How many answers are empty, cut, or the one that comes most often."""
    texts = Counter(answer.text for answer in answers)
    return {
        "empty_share": texts[""] / len(answers),
        "commonest_share": max(texts.values()) / len(answers),
        "truncated_share": fmean(answer.finish == "length" for answer in answers),
    }
