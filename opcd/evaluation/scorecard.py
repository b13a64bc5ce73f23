"""The scorecard: what the prompt gave, what the weights kept of it, and how sure that is."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch

from opcd.config import TrainConfig
from opcd.models.lm import batches_by_tokens, head_of
from opcd.objective import head_divergence
from opcd.passes.plan import Plan, find_plan, planned_hidden
from opcd.rollouts.choice import build_engine
from opcd.rollouts.generate import Rollout, RolloutEngine, SamplingParams
from opcd.tasks.chat import Chat
from opcd.tasks.task import Prompt, Task, spread
from opcd.teacher import SharedPrefixTeacher

COLUMNS = ("base", "prompted", "distilled", "distilled_prompted")


def answer(
    engine: RolloutEngine, prompt_ids: Sequence[Sequence[int]], config: TrainConfig
) -> list[Rollout]:
    """Greedy answers to prompts given as token ids."""
    return engine.generate(
        prompt_ids, SamplingParams(config.max_completion_tokens, temperature=0.0)
    )


def measure(
    rollouts: Sequence[Rollout], prompts: Sequence[Prompt], task: Task, chat: Chat
) -> tuple[dict[str, Any], list[bool]]:
    """One column of the scorecard, and which answers were right."""
    right = [
        task.scorer(chat.decode(r.completion_token_ids), p.example.answers)
        for r, p in zip(rollouts, prompts, strict=True)
    ]
    column = {
        "accuracy": sum(right) / len(right),
        "accuracy_interval_95": wilson_interval(sum(right), len(right)),
        "n": len(right),
        "mean_completion_tokens": fmean(len(r.completion_token_ids) for r in rollouts),
        "truncated_share": fmean(r.finish_reason == "length" for r in rollouts),
    }
    return column, right


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> list[float]:
    """95 % score interval of a proportion (Wilson, 1927); honest at 0 and 1 too."""
    p = successes / n
    centre = p + z * z / (2 * n)
    spread_ = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + s) / (1 + z * z / n) for s in (-spread_, spread_))
    return [max(0.0, low), min(1.0, high)]


def internalised(base: float, prompted: float, distilled: float) -> float | None:
    """Share of the prompt's gain that the weights hold; None where the prompt gained nothing."""
    return (distilled - base) / (prompted - base) if prompted > base else None


@torch.no_grad()
def held_out_divergence(
    student: torch.nn.Module,
    engine: RolloutEngine,
    teacher: SharedPrefixTeacher,
    prompts: Sequence[Prompt],
    config: TrainConfig,
    plan: Plan,
) -> float:
    """Mean reverse KL to the teacher, nats per token, on completions that the student samples.

    `engine` is the student's. Draws from a generator of its own, so that the state of the run stays
    as it was.
    """
    device = next(student.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        rollouts = engine.generate(
            [p.student_ids for p in prompts],
            SamplingParams(config.max_completion_tokens, config.temperature),
        )
    completions = [r.completion_token_ids for r in rollouts]
    scored = teacher.score(
        [p.teacher_ids for p in prompts], completions, [p.context for p in prompts]
    )
    theirs = scored.hidden.split([len(c) for c in completions])
    total = 0.0
    lengths = [len(p.student_ids) + len(c) for p, c in zip(prompts, completions, strict=True)]
    for batch in batches_by_tokens(lengths, config.max_tokens_per_pass):
        ours = planned_hidden(
            student, [prompts[i].student_ids for i in batch], [completions[i] for i in batch], plan
        )
        out = head_divergence(
            ours,
            head_of(student),
            torch.cat([theirs[i] for i in batch]),
            teacher.head,
            temperature=config.temperature,
        )
        total += out.per_token.sum().item()
    return total / sum(map(len, completions))


def evaluate(
    base: torch.nn.Module,
    distilled: torch.nn.Module | None,
    teacher: SharedPrefixTeacher,
    task: Task,
    chat: Chat,
    config: TrainConfig,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scorecard on the test prompts, and every answer it was made from.

    Without a distilled model its columns are null. `say` is told what is being measured.
    """
    plan = find_plan(base, task.a_prefix) if config.teacher else teacher.plan
    card: dict[str, Any] = dict.fromkeys(COLUMNS)
    answers: list[dict[str, Any]] = [
        {"prompt": list(p.example.messages), "accepted": list(p.example.answers)} for p in task.test
    ]
    held_out = spread(task.test, config.divergence_prompts)
    divergence: dict[str, float | None] = {"before": None, "after": None}
    for name, when, model in (("base", "before", base), ("distilled", "after", distilled)):
        if model is None:
            continue
        engine = build_engine(config.rollout_engine, model, config.rollout_batch_size, plan)
        with_context = "prompted" if name == "base" else "distilled_prompted"
        for column, prompt_ids in (
            (name, [p.student_ids for p in task.test]),
            (with_context, [task.prompted_ids(p) for p in task.test]),
        ):
            say(column)
            rollouts = answer(engine, prompt_ids, config)
            card[column], right = measure(rollouts, task.test, task, chat)
            for row, rollout, ok in zip(answers, rollouts, right, strict=True):
                row[column] = chat.decode(rollout.completion_token_ids)
                row[f"{column}_right"] = ok
        say(f"divergence {when}")
        divergence[when] = held_out_divergence(model, engine, teacher, held_out, config, plan)
        engine.close()
    card["internalised"] = (
        internalised(*(card[c]["accuracy"] for c in ("base", "prompted", "distilled")))
        if distilled is not None
        else None
    )
    card["divergence"] = divergence | {
        "unit": "nats per completion token, student || teacher",
        "prompts": len(held_out),
    }
    card["prompt_tokens_saved"] = task.prompt_tokens_saved
    card["scorer"] = config.scorer
    card["decoding"] = {"temperature": 0.0, "max_completion_tokens": config.max_completion_tokens}
    card["data"] = {"part": "test", "file": config.eval_data}
    return card, answers
