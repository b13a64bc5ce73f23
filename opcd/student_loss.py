"""Body and loss of the student in one forward: what wrappers (DDP, FSDP2, compile) wrap."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opcd.episodes import Episode, scored_tokens
from opcd.models.head import head_of
from opcd.objective import Losses, Targets, head_divergence
from opcd.passes.hidden import Row
from opcd.passes.plan import Plan, planned_hidden


class StudentLoss(torch.nn.Module):
    """What a student loses on episodes, each scored as it says (`sources.scored_as` sets it)."""

    def __init__(
        self,
        student: torch.nn.Module,
        plan: Plan,  # of the student's passes
        temperature: float = 1.0,
        add_weight_grad: bool = False,  # see `linear_divergence`
    ) -> None:
        super().__init__()
        self.student = student
        self.plan = plan
        self._options: dict[str, Any] = {
            "temperature": temperature,
            "add_weight_grad": add_weight_grad,
        }

    def forward(
        self,
        episodes: Sequence[Episode],
        targets: Targets,
        token_weights: Tensor,  # (N,) on the CPU: each scored token's, before its episode's own
    ) -> Losses:
        """Loss, and what was found at each scored token, in the order of the episodes."""
        rows = [Row(episode.student_ids, episode.student_spans) for episode in episodes]
        hidden = planned_hidden(self.student, rows, self.plan)
        head = head_of(self.student)
        weights, how = _scoring(episodes, token_weights)
        return head_divergence(
            hidden, head, targets.hidden, targets.head, weights, **how, **self._options
        )


def _scoring(episodes: Sequence[Episode], token_weights: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The divergence's weights, and the options of `linear_divergence` that episodes ask for.

    What is the same for all of them stays a number: it costs no more than one divergence does.
    """
    lengths = torch.tensor(scored_tokens(episodes))

    def of_tokens(values: list[float]) -> Tensor:
        return torch.tensor(values).repeat_interleave(lengths)

    shares = [episode.forward_share for episode in episodes]
    same = len(set(shares)) == 1
    how: dict[str, Any] = {"forward_share": shares[0] if same else of_tokens(shares)}
    weights = token_weights
    if any(episode.divergence_weight != 1 for episode in episodes):
        weights = token_weights * of_tokens([e.divergence_weight for e in episodes])
    if any(episode.likelihood_weight for episode in episodes):
        how["target_ids"] = torch.tensor([t for e in episodes for t in e.scored_ids])
        how["logprob_weights"] = token_weights * of_tokens([e.likelihood_weight for e in episodes])
    return weights, how
