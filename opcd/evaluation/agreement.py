"""How far a student is from its teacher: on what it says itself, and on what the teacher says."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.config import TrainConfig
from opcd.episodes import Episode, Prompt, scored_tokens
from opcd.evaluation.intervals import PerRequest
from opcd.models.head import Head, head_of
from opcd.objective import head_divergence, head_logprobs
from opcd.passes.hidden import Row
from opcd.passes.plan import Plan, planned_hidden
from opcd.rollouts.noise import HELD_OUT
from opcd.rollouts.protocol import RolloutEngine, SamplingParams, complete
from opcd.runtime.batches import batches_by_tokens
from opcd.teacher import SharedPrefixTeacher


class Side(NamedTuple):
    """Completions and what a model makes of their tokens; its body is no longer needed."""

    episodes: list[Episode]
    hidden: Tensor  # (N, D), what predicts each scored token
    head: Head


class KL(NamedTuple):
    """How far two models are apart on the same tokens, in nats over tokens, a request each."""

    reverse_kl: PerRequest  # KL(student ‖ teacher)
    forward_kl: PerRequest  # KL(teacher ‖ student)
    student_entropy: PerRequest


class Divergences(NamedTuple):
    """What two models make of the same tokens, in nats over tokens, a request each."""

    reverse_kl: PerRequest
    forward_kl: PerRequest
    student_entropy: PerRequest
    teacher_entropy: PerRequest


class Gap(NamedTuple):
    """What a student misses of what its teacher says."""

    nats: PerRequest  # log p of the teacher minus log p of the student, over tokens
    likeliest: PerRequest  # tokens that are the student's likeliest, over tokens
    # Of each token of each completion, in nats: log p of the teacher minus that of the student, and
    # the student's.
    missed: list[list[float]]
    student_logprobs: list[list[float]]


@torch.no_grad()
def student_side(
    student: torch.nn.Module, plan: Plan, episodes: Sequence[Episode], config: TrainConfig
) -> Side:
    """What a student, without the context, makes of completions."""
    parts: dict[int, Tensor] = {}
    lengths = scored_tokens(episodes)
    sizes = [len(e.student_ids) for e in episodes]
    for batch in batches_by_tokens(sizes, config.max_tokens_per_pass):
        rows = [Row(episodes[i].student_ids, episodes[i].student_spans) for i in batch]
        hidden = planned_hidden(student, rows, plan)
        parts.update(zip(batch, hidden.split([lengths[i] for i in batch]), strict=True))
    in_order = torch.cat([parts[i] for i in range(len(episodes))])
    return Side([*episodes], in_order, head_of(student))


def own_side(
    student: torch.nn.Module,
    plan: Plan,
    engine: RolloutEngine,  # the student's
    prompts: Sequence[Prompt],
    params: SamplingParams,  # as in training
    config: TrainConfig,
) -> Side:
    """Completions that the student samples, the same draws at every call, and what it thinks."""
    episodes = complete(engine, prompts, params, config.seed, HELD_OUT)
    return student_side(student, plan, episodes, config)


def teacher_side(teacher: SharedPrefixTeacher, episodes: Sequence[Episode]) -> Side:
    """What a teacher, behind the context, makes of completions."""
    targets = teacher.score(episodes)
    return Side([*episodes], targets.hidden, targets.head)


def divergences(student: Side, teacher: Side, temperature: float) -> Divergences:
    """Both KL and both entropies, of the student's and the teacher's side of the same tokens."""
    # What the loss reports of a student is asked of the teacher, in the student's place.
    back = kl_both_ways(teacher, student, temperature)
    return Divergences(*kl_both_ways(student, teacher, temperature), back.student_entropy)


@torch.no_grad()
def kl_both_ways(student: Side, teacher: Side, temperature: float) -> KL:
    """Both KL and the student's entropy, in one pass over the vocabulary."""
    sides = student.hidden, student.head, teacher.hidden, teacher.head
    out = head_divergence(*sides, temperature=temperature, forward_share=0.5)
    assert out.reverse_kl is not None
    assert out.forward_kl is not None
    found = out.reverse_kl, out.forward_kl, out.student_entropy
    return KL(*(_per_request(values, student.episodes) for values in found))


@torch.no_grad()
def gap_between(student: Side, teacher: Side, temperature: float) -> Gap:
    """What the student misses on the teacher's completions, of both sides of them."""
    episodes = student.episodes
    ids = torch.tensor([t for e in episodes for t in e.scored_ids], device=student.hidden.device)
    both = min(len(student.head.weight), len(teacher.head.weight))
    ours, first = head_logprobs(student.hidden, student.head, ids, both, temperature)
    theirs, _ = head_logprobs(teacher.hidden, teacher.head, ids, both, temperature)
    missed, lengths = theirs - ours, scored_tokens(episodes)
    return Gap(
        _per_request(missed, episodes),
        _per_request(first.float(), episodes),
        [part.tolist() for part in missed.split(lengths)],
        [part.tolist() for part in ours.split(lengths)],
    )


def _per_request(values: Tensor, episodes: Sequence[Episode]) -> PerRequest:
    lengths = scored_tokens(episodes)
    return PerRequest([x.sum().item() for x in values.double().split(lengths)], lengths)
