"""The training loop: sample, score, step.

prompts ── student, without context ──► completions
completions ── frozen teacher, behind the shared context ──► its hidden states
both hidden states, both heads ── exact reverse KL over the vocabulary ──► gradient ──► step
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.models.lm import autocast, batches_by_tokens, head_of
from opcd.objective import head_divergence
from opcd.passes.plan import Plan, planned_hidden
from opcd.rollouts.generate import Rollout, RolloutEngine, SamplingParams
from opcd.runtime.stopwatch import Stopwatch
from opcd.tasks.task import Prompt
from opcd.teacher import SharedPrefixTeacher


class Distiller:
    """On-policy context distillation of `teacher` into `student`, one step at a time."""

    def __init__(
        self,
        student: torch.nn.Module,
        teacher: SharedPrefixTeacher,
        engine: RolloutEngine,
        config: TrainConfig,
        compute_dtype: torch.dtype,
        plan: Plan,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.engine = engine
        self.config = config
        self.steps_done = 0
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._device = self.parameters[0].device
        self._compute_dtype = compute_dtype
        self.plan = plan  # of the student's passes
        self._sampling = SamplingParams(config.max_completion_tokens, config.temperature)

    def step(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """One step on `prompts`; returns its metrics."""
        watch = Stopwatch(self._device)
        watch.mark()
        rollouts = self.rollout(prompts)
        watch.mark()
        teacher_hidden = self.score(prompts, rollouts)
        watch.mark()
        metrics = self.update(rollouts, teacher_hidden)
        watch.mark()
        rollout_s, teacher_s, update_s = watch.laps()
        step_s = rollout_s + teacher_s + update_s
        lengths = [len(r.completion_token_ids) for r in rollouts]
        return {
            "step": self.steps_done,
            **metrics,
            "completion_tokens_mean": sum(lengths) / len(lengths),
            "truncated_share": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
            "rollout_time_s": rollout_s,
            "teacher_time_s": teacher_s,
            "update_time_s": update_s,
            "step_time_s": step_s,
            "completion_tokens_per_s": sum(lengths) / step_s,
        }

    def rollout(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The student completes the prompts without the context."""
        self.engine.sync(self.student, self.steps_done)
        with self.autocast():
            return self.engine.generate(
                [p.student_ids for p in prompts], self._sampling, self.config.completions_per_prompt
            )

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[Tensor]:
        """The teacher's hidden states for the same tokens behind the context, one (L, D) each."""
        n = self.config.completions_per_prompt
        scored = self.teacher.score(
            [p.teacher_ids for p in prompts for _ in range(n)],
            [r.completion_token_ids for r in rollouts],
            [p.context for p in prompts for _ in range(n)],
        )
        return list(scored.hidden.split([len(r.completion_token_ids) for r in rollouts]))

    def update(
        self, rollouts: Sequence[Rollout], teacher_hidden: Sequence[Tensor]
    ) -> dict[str, float]:
        """One optimizer step on the divergence; the same whatever `max_tokens_per_pass` is."""
        config = self.config
        weights = token_weights([len(r.completion_token_ids) for r in rollouts], config)
        totals = torch.zeros(3, device=self._device)  # loss, Σ divergence, Σ entropy
        # Some models recompute activations in training mode only; dropout is off in either.
        self.student.train(config.gradient_checkpointing)
        for batch in batches_by_tokens(
            [len(r.prompt_token_ids) + len(r.completion_token_ids) for r in rollouts],
            config.max_tokens_per_pass,
        ):
            with self.autocast():
                hidden = planned_hidden(
                    self.student,
                    [rollouts[i].prompt_token_ids for i in batch],
                    [rollouts[i].completion_token_ids for i in batch],
                    self.plan,
                )
                out = head_divergence(
                    hidden,
                    head_of(self.student),
                    torch.cat([teacher_hidden[i] for i in batch]),
                    self.teacher.head,
                    torch.cat([weights[i] for i in batch]),
                    config.divergence,
                    config.beta,
                    config.temperature,
                )
            out.loss.backward()
            totals += torch.stack(
                [out.loss.detach(), out.per_token.sum(), out.student_entropy.sum()]
            )
        self.student.eval()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        loss, divergence, entropy, grad_norm = [*totals.tolist(), norm.item()]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad()
            raise InputError(
                f"the loss must be finite, got loss {loss} and gradient norm {grad_norm} in step "
                f"{self.steps_done + 1}; the state before that step is saved: continue with "
                f"--resume and a lower --learning_rate or --max_grad_norm, or --dtype float32"
            )
        learning_rate = config.learning_rate * rate_factor(self.steps_done, config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        n = sum(len(r.completion_token_ids) for r in rollouts)
        return {
            "loss": loss,
            "divergence": divergence / n,
            "student_entropy": entropy / n,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        }

    def autocast(self) -> torch.autocast:
        """The arithmetic of every pass of the student."""
        return autocast(self._device, self._compute_dtype)


def rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate in step number `step`, from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    return max(config.steps - step, 0) / max(config.steps - config.warmup_steps, 1)


def token_weights(lengths: Sequence[int], config: TrainConfig) -> list[Tensor]:
    """Each token's share of the loss: one denominator for the whole step, whatever the passes."""
    if config.average_over == "tokens":
        return [torch.full((n,), 1 / sum(lengths)) for n in lengths]
    return [torch.full((n,), 1 / (n * len(lengths))) for n in lengths]


def step_prompts(prompts: Sequence[Prompt], step: int, config: TrainConfig) -> list[Prompt]:
    """The prompts of step number `step` (from 0): epochs of seeded shuffles, one after another."""
    chosen = []
    order: list[int] = []
    first = step * config.prompts_per_step
    for position in range(first, first + config.prompts_per_step):
        epoch, offset = divmod(position, len(prompts))
        if not order or offset == 0:
            generator = torch.Generator().manual_seed(config.seed + 7919 * epoch)
            order = torch.randperm(len(prompts), generator=generator).tolist()
        chosen.append(prompts[order[offset]])
    return chosen
