"""What keeps a distilled model right where its prompt is sent all the same.

The student's answers without the context are what it should say with it, too: on its own
completions, KL(student without the context, held fixed ‖ student with it) is added to the loss
(NCA, arXiv 2606.11627). The context's keys and values are the student's own, computed once a step
and held fixed as well: the gradient passes through the completions and their prompts alone.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opcd.config import TrainConfig
from opcd.episodes import Episode
from opcd.errors import InputError
from opcd.models.head import head_of
from opcd.models.lm import causal_lm, max_positions, rope_differs
from opcd.objective import Losses, head_divergence
from opcd.passes.hidden import Row, scored_hidden
from opcd.passes.plan import Plan, planned_hidden
from opcd.passes.prefix import SharedPrefix
from opcd.rollouts.decode import uncached_autocast


class ReturnAnchor:
    """The divergence of a student with the context from itself without it.

    Raises InputError for a model whose passes cannot go on behind a recorded context.
    """

    def __init__(
        self,
        student: torch.nn.Module,
        plan: Plan,  # of the student
        prefixes: Mapping[str, Sequence[int]],  # by the name of the context
        config: TrainConfig,
    ) -> None:
        kind, lm = type(causal_lm(student)).__name__, causal_lm(student)
        longest = max_positions(lm.config) or 2**31
        moved = [n for n in map(len, prefixes.values()) if rope_differs(lm.config, n, longest)]
        if not plan.shares_prefix or moved:
            reason = "its rotary frequencies depend on the length" if moved else plan.reason
            raise InputError(
                f"return_anchor must have a model that goes on behind a context which is held "
                f"fixed, got {kind}: {reason}; set return_anchor to 0"
            )
        self._student = student
        self._plan = plan
        self._prefix_ids = prefixes
        self._prefixes: dict[str, SharedPrefix] = {}
        self._weight, self._temperature = config.return_anchor, config.temperature

    @torch.no_grad()
    def record(self) -> None:
        """Take the contexts' keys and values with the student's weights as they are."""
        self._prefixes = {n: SharedPrefix(self._student, x) for n, x in self._prefix_ids.items()}

    def loss(self, episodes: Sequence[Episode], token_weights: Tensor) -> Losses:
        """Of the student's own completions, each token with its share of the step's loss."""
        head = head_of(self._student)
        rows = [Row(e.student_ids, e.student_spans) for e in episodes]
        # Casts made without gradients must not be taken by the pass that has some, as some
        # versions of torch let it (pytorch issue 112583).
        with torch.no_grad(), uncached_autocast(causal_lm(self._student).device):
            without = planned_hidden(self._student, rows, self._plan)
        fixed = head._replace(
            weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach()
        )
        return head_divergence(
            *(self._with_context(episodes), head),
            *(without, fixed),
            self._weight * token_weights,
            forward_share=1.0,
            temperature=self._temperature,
        )

    def _with_context(self, episodes: Sequence[Episode]) -> Tensor:  # (N, D)
        rows = [Row(e.teacher_ids, e.teacher_spans, self._prefixes[e.context]) for e in episodes]
        if self._plan.packs(causal_lm(self._student).device.type, grad=True):
            return scored_hidden(self._student, rows, packed=True)
        by_context: dict[str, list[int]] = {}
        for i, episode in enumerate(episodes):
            by_context.setdefault(episode.context, []).append(i)
        parts: dict[int, Tensor] = {}
        for members in by_context.values():
            hidden = scored_hidden(self._student, [rows[i] for i in members])
            lengths = [episodes[i].scored_tokens for i in members]
            parts.update(zip(members, hidden.split(lengths), strict=True))
        return torch.cat([parts[i] for i in range(len(episodes))])
