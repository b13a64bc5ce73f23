"""Body and loss of the student in one forward: what wrappers (DDP, FSDP2, compile) wrap."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opcd.episodes import Episode
from opcd.models.lm import head_of
from opcd.objective import Losses, Targets, head_divergence
from opcd.passes.hidden import Row
from opcd.passes.plan import Plan, planned_hidden


class StudentLoss(torch.nn.Module):
    """Σ token weight · divergence of a student to its targets, one pass over a few episodes."""

    def __init__(
        self,
        student: torch.nn.Module,
        plan: Plan,  # of the student's passes
        divergence: str = "reverse_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        add_weight_grad: bool = False,  # see `linear_divergence`
    ) -> None:
        super().__init__()
        self.student = student
        self.plan = plan
        self._options = divergence, beta, temperature, add_weight_grad

    def forward(
        self,
        episodes: Sequence[Episode],
        targets: Targets,
        token_weights: Tensor | None = None,  # (N,), each scored token's; default 1/N
    ) -> Losses:
        """Loss, and divergence and entropy of each scored token, in the order of the episodes."""
        hidden = planned_hidden(
            self.student,
            [Row(episode.student_ids, episode.student_spans) for episode in episodes],
            self.plan,
        )
        head = head_of(self.student)
        return head_divergence(
            hidden, head, targets.hidden, targets.head, token_weights, *self._options
        )
