"""What a run measures of its student on the validation requests, before and while it trains."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

import torch

from opcd.evaluation.agreement import (
    Divergences,
    Gap,
    Side,
    divergences,
    gap_between,
    kl_both_ways,
    own_side,
    student_side,
    teacher_side,
)
from opcd.evaluation.contenders import Answer, answers_alone, prompted_answers
from opcd.evaluation.decoding import greedy_params, rollout_params
from opcd.evaluation.intervals import PerRequest, paired_difference
from opcd.evaluation.observed import episodes_of
from opcd.evaluation.scorecard import accuracy
from opcd.models.lm import causal_lm
from opcd.tasks.prepare import Setup
from opcd.tasks.task import spread
from opcd.training.guided import teacher_engine
from opcd.training.loop import Distiller


class Validation:
    """Measures a student, without the context, against what the prompted teacher says.

    The teacher is frozen, so its part is made once, when it is first needed.
    """

    def __init__(self, distiller: Distiller, setup: Setup) -> None:
        self._distiller = distiller
        self._setup = setup
        self._cases = setup.task.validation
        self._held_out = spread(self._cases, setup.config.divergence_prompts)

    def measure(self) -> dict[str, Any]:
        """Accuracy where it can be judged, agreement with the teacher, both divergences, and time.

        behind_prompted: how much more accurate the prompted teacher is, request by request.
        gap: nats a token that the student misses on the teacher's own answers: behaviour that it
            does not show. It says more than the divergence on the student's samples, which is as
            low for a student that has settled on one of two behaviours. Below 0 where the student
            is more certain of them than the teacher.
        missed_kl: KL(teacher ‖ student) at the tokens of those answers, in nats: 0 for the teacher
            alone, so that certainty does not improve it.
        """
        begin = time.perf_counter()
        gap, missed_kl, apart = self.distances()
        answers, said = self.answers(), self.said
        same = [a.text == b.text for a, b in zip(answers, said, strict=True)]
        return {
            **self._judged(answers),
            "gap": gap.nats.mean,
            "missed_kl": missed_kl.mean,
            "top1_agreement": gap.likeliest.mean,
            "greedy_agreement": fmean(same),
            "divergence": apart.reverse_kl.mean,
            "forward_kl": apart.forward_kl.mean,
            "student_entropy": apart.student_entropy.mean,
            "teacher_entropy": apart.teacher_entropy.mean,
            **_shares(answers),
            "prompted": {**_accuracy(self._said_right), **_shares(said)},
            "time_s": time.perf_counter() - begin,
        }

    def answers(self) -> list[Answer]:
        """What the student as it is answers to the requests, without the context."""
        distiller, params = self._distiller, greedy_params(self._setup)
        distiller.engine.sync(distiller.student, distiller.steps_done)
        return distiller.in_low_precision(
            lambda: answers_alone(distiller.engine, self._cases, params, self._setup)
        )

    def distances(self) -> tuple[Gap, PerRequest, Divergences]:
        """How far it is from the teacher: on what the teacher says, the gap and KL(teacher ‖
        student); and on its own samples."""
        distiller, shown, config = self._distiller, self.shown, self._setup.config
        student, engine, plan = distiller.student, distiller.engine, distiller.student_loss.plan
        prompts = [case.prompt for case in self._held_out]
        params = rollout_params(self._setup)
        engine.sync(student, distiller.steps_done)
        own, missed = distiller.in_low_precision(
            lambda: (
                own_side(student, plan, engine, prompts, params, config),
                student_side(student, plan, shown.episodes, config),
            )
        )
        theirs = teacher_side(distiller.teacher, own.episodes)
        return (
            gap_between(missed, shown, config.temperature),
            kl_both_ways(missed, shown, config.temperature).forward_kl,
            divergences(own, theirs, config.temperature),
        )

    @cached_property
    def said(self) -> list[Answer]:
        """What the prompted teacher answers to the requests."""
        teacher, config = self._distiller.teacher, self._setup.config
        device = causal_lm(teacher.model).device
        with teacher.frozen(), torch.autocast(device.type, enabled=False):
            engine = teacher_engine(teacher, config)
            answers = prompted_answers(engine, self._cases, greedy_params(self._setup), self._setup)
            engine.close()
        return answers

    @cached_property
    def shown(self) -> Side:
        """What it makes of those of its answers on which distances are measured."""
        episodes = episodes_of(self._cases, self.said, self._held_out)
        return teacher_side(self._distiller.teacher, episodes)

    def _judged(self, answers: Sequence[Answer]) -> dict[str, Any]:
        right, theirs = self._right(answers), self._said_right
        if not right:
            return {}
        each = [1.0] * len(right)
        behind = paired_difference(PerRequest(theirs, each), PerRequest(right, each))
        return {**_accuracy(right), "behind_prompted": behind.summary()}

    @cached_property
    def _said_right(self) -> list[float]:
        return self._right(self.said)

    def _right(self, answers: Sequence[Answer]) -> list[float]:
        """How right each answer is, from 0 to 1; [] where nothing says what is right."""
        scorer = self._setup.task.scorer
        if not self._setup.task.judges(self._cases):
            return []
        return [
            accuracy([answer], [case], scorer, [theirs.text])
            for answer, case, theirs in zip(answers, self._cases, self.said, strict=True)
        ]


def rank(found: dict[str, Any]) -> tuple[float, float]:
    """What makes one validation better than another: accuracy, then how near the student is to the
    teacher on the teacher's answers; without accuracy that alone.

    Those of versions before hold no such distance, and are worse where accuracies are equal.
    """
    return found.get("accuracy", 0.0), -found.get("missed_kl", math.inf)


def _accuracy(right: Sequence[float]) -> dict[str, float]:
    return {"accuracy": fmean(right), "n": len(right)} if right else {}


def _shares(answers: Sequence[Answer]) -> dict[str, float]:
    """How many answers are empty, cut, or the one that comes most often."""
    texts = Counter(answer.text for answer in answers)
    return {
        "empty_share": texts[""] / len(answers),
        "commonest_share": max(texts.values()) / len(answers),
        "truncated_share": fmean(answer.finish == "length" for answer in answers),
    }
