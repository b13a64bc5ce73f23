"""The training loop: sample, score, step.

prompts ── student, without context ──► episodes
episodes ── frozen teacher, behind the shared context ──► targets: its hidden states, its head
episodes, targets ── exact divergence over the vocabulary ──► gradient ──► step

What is sampled, and how each episode is scored, is the source's to say (`sources.py`).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from opcd.config import TrainConfig
from opcd.config.rate import rate_factor, usual_rate
from opcd.episodes import Episode, scored_tokens
from opcd.errors import InputError
from opcd.models.cast_weights import CastWeights
from opcd.models.lm import autocast, recompute_activations
from opcd.models.sdpa import without_cudnn_attention
from opcd.objective import Losses, Targets
from opcd.rollouts.protocol import RolloutEngine
from opcd.runtime.batches import batches_by_tokens
from opcd.runtime.memory import peak_memory
from opcd.runtime.stopwatch import Stopwatch
from opcd.runtime.upload import uploaded
from opcd.student_loss import StudentLoss
from opcd.teacher import SharedPrefixTeacher
from opcd.training.anchor import ReturnAnchor
from opcd.training.sources import Source

T = TypeVar("T")
KINDS = ("student", "replay", "guided")  # of tokens, that metrics tell apart


class Diverged(InputError):
    """The loss of a step is not finite."""


class Distiller:
    """On-policy context distillation of `teacher` into a student, one step at a time."""

    def __init__(
        self,
        student_loss: StudentLoss,
        teacher: SharedPrefixTeacher,
        engine: RolloutEngine,  # samples from the student
        source: Source,
        config: TrainConfig,
        compute_dtype: torch.dtype,
        anchor: ReturnAnchor | None = None,
    ) -> None:
        self.student_loss = student_loss
        self.student = student_loss.student
        self.teacher = teacher
        self.engine = engine
        self.source = source
        self.anchor = anchor
        self.config = config
        self.steps_done = 0
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]
        size = sum(p.numel() for p in self.student.parameters())
        self.peak_rate = config.learning_rate or usual_rate(size, bool(config.lora_rank))
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.peak_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._device = self.parameters[0].device
        self._compute_dtype = compute_dtype
        low = compute_dtype != torch.float32
        self.casts = CastWeights(self.student, compute_dtype) if low else None

    def step(self) -> dict[str, Any]:
        """The next step; returns its metrics."""
        watch = Stopwatch(self._device)
        watch.mark()
        episodes = self.rollout()
        watch.mark()
        targets = self.score(episodes)
        watch.mark()
        metrics = self.update(episodes, targets)
        watch.mark()
        rollout_s, teacher_s, update_s = watch.laps()
        step_s = rollout_s + teacher_s + update_s
        lengths = scored_tokens(episodes)
        of_task = [e for e in episodes if e.origin != "replay"]
        return {
            "step": self.steps_done,
            **metrics,
            "completion_tokens": sum(lengths),
            "mean_completion_tokens": sum(lengths) / len(lengths),
            "longest_completion": max(lengths),
            "truncated_share": sum(e.finish == "length" for e in of_task) / max(1, len(of_task)),
            "eos_share": sum(e.finish == "stop" for e in of_task) / max(1, len(of_task)),
            **self.source.figures(),
            "rollout_time_s": rollout_s,
            "teacher_time_s": teacher_s,
            "update_time_s": update_s,
            "step_time_s": step_s,
            "completion_tokens_per_s": sum(lengths) / step_s,
            "peak_memory_bytes": peak_memory(self._device),
        }

    def rollout(self) -> list[Episode]:
        """What the next step trains on, from the student as it is."""
        self.engine.sync(self.student, self.steps_done)
        return self.in_low_precision(lambda: self.source.episodes(self.steps_done, self.engine))

    def score(self, episodes: Sequence[Episode]) -> Targets:
        """The teacher's side of the same tokens, behind the context."""
        return self.teacher.score(episodes)

    def update(self, episodes: Sequence[Episode], targets: Targets) -> dict[str, float]:
        """One optimizer step on the divergence; the same whatever `max_tokens_per_pass` is."""
        config = self.config
        lengths = scored_tokens(episodes)
        totals = self.backward(episodes, targets)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        loss, entropy, own, replay, guided, anchor, reverse, forward = totals.tolist()
        grad_norm = norm.item()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad()
            raise Diverged(
                f"the loss must be finite, got loss {loss} and gradient norm {grad_norm} in step "
                f"{self.steps_done + 1}; the state before that step is saved: resume the "
                f"run with a lower learning_rate or max_grad_norm, or with dtype float32"
            )
        learning_rate = self.peak_rate * rate_factor(self.steps_done, config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self._device.type != "cpu")
        self.weights_changed()
        self.steps_done += 1
        counts = dict.fromkeys(KINDS, 0)
        for episode in episodes:
            counts[_kind(episode)] += episode.scored_tokens
        count_own = counts["student"]
        return {
            "loss": loss,
            "divergence": own / count_own if count_own else None,
            **({"guided_loss": guided / counts["guided"]} if counts["guided"] else {}),
            **({"replay_divergence": replay / counts["replay"]} if counts["replay"] else {}),
            **({"anchor_divergence": anchor / count_own} if self.anchor and count_own else {}),
            **{
                name: total / sum(lengths)
                for name, total in (("reverse_kl", reverse), ("forward_kl", forward))
                if not math.isnan(total)
            },
            "student_entropy": entropy / sum(lengths),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
        }

    def backward(self, episodes: Sequence[Episode], targets: Targets) -> Tensor:  # (8,)
        """The gradient of a step, added to what the parameters have.

        Returns the loss, Σ entropy, Σ of own, of replayed and of guided tokens, Σ of the anchor's
        divergence, Σ of both KL, NaN where they are not computed.
        """
        config = self.config
        weights = token_weights(episodes, config)
        totals = torch.zeros(8, device=self._device)
        if self.anchor is not None:
            self.in_low_precision(self.anchor.record)
        recompute_activations(self.student, config.gradient_checkpointing)
        nan = torch.full((), math.nan, device=self._device)
        for batch in batches_by_tokens(
            [len(e.student_ids) for e in episodes], config.max_tokens_per_pass
        ):
            some, of_tokens = [episodes[i] for i in batch], torch.cat([weights[i] for i in batch])
            with without_cudnn_attention():  # around the layers that the backward computes again
                out = self._passed(partial(self.student_loss, some, targets.of(batch), of_tokens))
                out.loss.backward()
                anchor_loss, anchored = self._anchored(some, of_tokens)
            totals += torch.stack(
                [
                    out.loss.detach() + anchor_loss,
                    out.student_entropy.sum(),
                    *self._by_origin(some, out),
                    anchored,
                    *(nan if kl is None else kl.sum() for kl in (out.reverse_kl, out.forward_kl)),
                ]
            )
        self.student.eval()
        return totals

    def _anchored(self, episodes: Sequence[Episode], weights: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the anchor; its loss, and Σ of its divergence over own tokens."""
        mine = [e.origin == "student" for e in episodes]
        if self.anchor is None or not any(mine):
            return torch.zeros((), device=self._device), torch.zeros((), device=self._device)
        anchor, own = self.anchor, [e for e in episodes if e.origin == "student"]
        of_own = weights[_of_tokens(mine, episodes)]
        out = self._passed(lambda: anchor.loss(own, of_own))
        out.loss.backward()
        return out.loss.detach(), out.per_token.sum()

    def _by_origin(self, episodes: Sequence[Episode], out: Losses) -> list[Tensor]:
        """What is minimised, summed over own, over replayed and over guided tokens, in nats."""
        found = out.per_token
        if out.logprobs is not None:
            likely = _of_tokens([e.likelihood_weight > 0 for e in episodes], episodes)
            found = found - out.logprobs * uploaded(likely, self._device)
        kinds = [_kind(e) for e in episodes]
        masks = [_of_tokens([k == kind for k in kinds], episodes) for kind in KINDS]
        return [(found * uploaded(mask, self._device)).sum() for mask in masks]

    def _passed(self, function: Callable[[], Losses]) -> Losses:
        """A pass with gradients, in the student's arithmetic."""
        with autocast(self._device, self._compute_dtype):
            # A recomputation in backward would no longer find the casts.
            if self.casts is None or self.config.gradient_checkpointing:
                return function()
            return self.casts.run(function)

    @torch.no_grad()
    def in_low_precision(self, function: Callable[[], T]) -> T:
        """`function()` in the arithmetic of the student's passes, without gradients."""
        with autocast(self._device, self._compute_dtype):
            return function() if self.casts is None else self.casts.run(function, head=True)

    def weights_changed(self) -> None:
        """The student's weights are others now."""
        if self.casts is not None:
            self.casts.outdated()


def _kind(episode: Episode) -> str:
    """Whose tokens an episode's are: recorded ones count with what the teacher wrote."""
    return episode.origin if episode.origin in KINDS else "guided"


def _of_tokens(values: Sequence[bool], episodes: Sequence[Episode]) -> Tensor:
    """(N,): each episode's value at its scored tokens."""
    return torch.tensor(values).repeat_interleave(torch.tensor(scored_tokens(episodes)))


def token_weights(episodes: Sequence[Episode], config: TrainConfig) -> list[Tensor]:
    """Each token's share of the loss: one denominator for the whole step, whatever the passes.

    Replayed episodes have `replay_share` of it together: else answers of many tokens would leave a
    task of labels next to nothing, and a conversation of many turns them.
    """
    lengths, of_replay = scored_tokens(episodes), [e.origin == "replay" for e in episodes]
    again = config.replayed / config.prompts_per_step
    shares = {True: again, False: 1 - again} if len({*of_replay}) == 2 else {of_replay[0]: 1.0}
    by_tokens = config.average_over == "tokens"
    sizes = dict.fromkeys(shares, 0)
    for n, kind in zip(lengths, of_replay, strict=True):
        sizes[kind] += n if by_tokens else 1
    return [
        torch.full((n,), shares[kind] / (sizes[kind] * (1 if by_tokens else n)))
        for n, kind in zip(lengths, of_replay, strict=True)
    ]
