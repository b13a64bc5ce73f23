"""What a run tells people: its plan before the first step, and a line after each."""

from typing import Any

from peft import PeftModel

from opcd.models.adapter import lora_coverage
from opcd.preflight.budget import budget, budget_lines, check_memory
from opcd.preflight.rendering import rendering, rendering_lines
from opcd.preflight.sample import sample
from opcd.runtime.device import in_words, unused_gpu
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup
from opcd.training.loop import Distiller

LOSSES = ("divergence", "guided_loss", "replay_divergence", "anchor_divergence")


def run_plan(setup: Setup, distiller: Distiller) -> str:
    """What will be trained on what, and how."""
    config, task = setup.config, setup.task
    shared, saved = task.shared_tokens, task.prompt_tokens_saved
    stay = f" where {shared - saved:.0f} stand without it" if shared > saved else ""
    trained = sum(p.numel() for p in distiller.parameters)
    kind = "every weight"
    if isinstance(distiller.student, PeftModel):
        kind = f"LoRA rank {config.lora_rank} on {lora_coverage(distiller.student)}"
    plan = distiller.teacher.plan
    often = "once" if plan.shares_prefix else "with every sequence"
    several = f"{len(task.prefixes)} of about " if len(task.prefixes) > 1 else ""
    lines = [
        f"context   {several}{shared:.0f} tokens{stay} ({saved:.0f} saved), computed {often}; "
        f"sequences {plan.mode}, {plan.backend} ({plan.reason})",
        *setup.prompt_lines,
        f"student   {config.model} on {in_words(setup.device)}, {config.dtype}, training {kind} "
        f"({trained / 1e6:.1f} M), at a rate of {distiller.peak_rate:g}",
        f"rollouts  {distiller.engine.name} engine, {config.rollout_batch_size} at once",
        f"data      {_trained_on(setup)}, {len(task.validation)} validation, "
        f"{len(task.test)} test prompts",
        *setup.notes,
    ]
    if reason := unused_gpu(setup.device):
        lines.append(f"note      this machine's GPU is not used: {reason}; see docs/gpu.md")
    rows = len(task.recorded or task.conversations)
    if config.prompts_per_step > rows:
        kind = "prompts" if rows == len(task.train) and not task.recorded else "conversations"
        lines.append(
            f"note      a step takes {config.prompts_per_step} {kind}, and there are {rows}: some "
            f"come more than once"
        )
    if config.warmup_steps > config.steps:
        lines.append(
            f"note      the warm-up of {config.warmup_steps} steps is longer than the run: the "
            f"learning rate ends at {config.steps / config.warmup_steps:.0%} of learning_rate"
        )
    return "\n".join(lines)


def _trained_on(setup: Setup) -> str:
    """How much there is to train on."""
    task = setup.task
    if setup.replay is not None:
        config = setup.config
        return (
            f"{len(task.train)} training, {len(setup.replay.prompts)} replayed "
            f"({config.replayed} of a step's {config.prompts_per_step})"
        )
    if not task.recorded:
        count, rows = len(task.train), len(task.conversations)
        return f"{count} training" if count == rows else f"{count} training of {rows} conversations"
    turns = sum(len(e.spans) for conversation in task.recorded for e in conversation)
    return f"{len(task.recorded)} recorded conversations with {turns} turns to train on"


def announce_prompts(setup: Setup, progress: Progress) -> None:
    """Say what both models are given, and whether that is what the chat template makes of it."""
    for line in rendering_lines(rendering(setup, sample(setup.task))):
        progress.say(line)


def announce_budget(setup: Setup, progress: Progress) -> None:
    """Say what a run needs, before weights are read.

    Raises InputError if that is more than the machine has.
    """
    made = budget(setup)
    check_memory(made)
    for line in budget_lines(made):
        progress.say(line)


def validation_note(found: dict[str, Any]) -> str:
    """A validation in a line: accuracy where it is judged, and what is missing to the teacher."""
    judged = f"accuracy {found['accuracy']:.1%}, " if "accuracy" in found else ""
    with_context = found["prompted"]
    prompted = f" (prompted {with_context['accuracy']:.1%})" if judged else ""
    return (
        f"{judged}{found['greedy_agreement']:.0%} of answers are the prompted model's{prompted}, "
        f"gap {found['gap']:.3f} nats a token on what it says"
    )


def step_note(metrics: dict[str, Any], best: dict[str, Any]) -> str:
    """A step's losses and speed, and the best validation so far."""
    found = {k: metrics.get(k) for k in LOSSES}
    losses = [f"{k.replace('_', ' ')} {x:.3f}" for k, x in found.items() if x is not None]
    text = (
        f"{', '.join(losses)}, {metrics['mean_completion_tokens']:.1f} tokens "
        f"each, {metrics['completion_tokens_per_s']:.0f} tokens/s"
    )
    if best["step"] is None:
        return text
    reached = f"{best['accuracy']:.0%}" if "accuracy" in best else f"gap {best['gap']:.3f}"
    return f"{text}, best {reached}"
