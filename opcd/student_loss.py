"""Body and loss of the student in one forward: what wrappers (DDP, FSDP2, compile) wrap."""

from collections.abc import Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor

from opcd.episodes import Episode, scored_tokens
from opcd.errors import InputError
from opcd.models.head import head_of
from opcd.models.lm import causal_lm, check_causal_lm, check_rope
from opcd.objective import Divergence, Losses, Targets, head_divergence
from opcd.passes.hidden import Row
from opcd.passes.plan import WHOLE, Plan, planned_hidden
from opcd.passes.sequences import Mask, TokenIds, marked_runs, whole_numbers
from opcd.runtime.upload import uploaded


class StudentLoss(torch.nn.Module):
    """What a student loses on sequences, against what a teacher made of the same tokens.

    Body, head and loss are one forward, so that a wrapper that works on a module's forward (DDP,
    FSDP2, accelerate, torch.compile) sees all that the gradient needs: wrap this, not the model.
    """

    # transformers' Trainer asks for it: it then counts the labels of a whole step, where it would
    # else take means of micro-batches' means.
    accepts_loss_kwargs = True

    def __init__(
        self,
        student: torch.nn.Module,  # a causal LM of transformers, in a peft wrapper or not
        plan: Plan = WHOLE,  # how the student's passes are made, see `find_plan`
        temperature: float = 1.0,  # both models' logits are divided by it
        add_weight_grad: bool = False,  # see `linear_divergence`
        divergence: Divergence = head_divergence,  # another one, to be measured against
    ) -> None:
        super().__init__()
        check_causal_lm(student)
        self.student = student
        self.plan = plan
        self._divergence = divergence
        self._options: dict[str, Any] = {
            "temperature": temperature,
            "add_weight_grad": add_weight_grad,
        }

    @overload
    def forward(
        self,
        sequences: Sequence[Episode],
        targets: Targets,
        token_weights: Tensor | None = None,  # (N,): each scored token's; default 1/N
    ) -> Losses: ...

    @overload
    def forward(
        self,
        sequences: TokenIds,  # (B, T)
        targets: Targets,
        token_weights: Tensor | None = None,
        *,
        completion_mask: Mask,  # (B, T), 1 on scored tokens
        attention_mask: Mask = None,  # (B, T), 1 on real tokens, pads on either side
        forward_share: float | Tensor = 0.0,  # or (N,)
    ) -> Losses: ...

    def forward(
        self,
        sequences: Sequence[Episode] | TokenIds,
        targets: Targets,
        token_weights: Tensor | None = None,
        *,
        completion_mask: Mask = None,
        attention_mask: Mask = None,
        forward_share: float | Tensor = 0.0,
    ) -> Losses:
        """Loss, and what was found at each scored token, in the order of the sequences.

        Sequences are episodes, each scored as it says; or token ids, padded (B, T) or lists, with a
        `completion_mask` of what is scored. `targets` are `SharedPrefixTeacher.score`'s for the
        same tokens. `token_weights`, best on the CPU, are the only reduction: for a part of a step
        or of a batch over processes, give each token 1 / the number of all.

        Raises InputError for masks that do not fit, for targets of another number of tokens, and
        for sequences on both sides of a length behind which the student's rotary frequencies are
        others.
        """
        if completion_mask is None:
            episodes = cast(Sequence[Episode], sequences)
            rows = [Row(episode.student_ids, episode.student_spans) for episode in episodes]
        else:
            rows = _marked_rows(sequences, completion_mask, attention_mask)
        if not rows:
            raise InputError(
                "there must be sequences to score, got none; give a process without any one of "
                "another's, with token weights of 0"
            )
        count = sum(length for row in rows for _, length in row.spans)
        if count != len(targets.hidden):
            raise InputError(
                f"targets must hold a row for each scored token, got {len(targets.hidden)} for "
                f"{count}; let the teacher score the same completions, with the same mask"
            )
        if token_weights is None:
            token_weights = torch.full((count,), 1 / count)
        how: dict[str, Any] = {"forward_share": forward_share}
        if completion_mask is None:
            token_weights, how = _scoring(episodes, token_weights)
        if lengths := [len(row.needed) for row in rows]:
            check_rope(causal_lm(self.student).config, min(lengths), max(lengths))
        hidden = planned_hidden(self.student, rows, self.plan)
        head = head_of(self.student)
        return self._divergence(
            hidden, head, targets.hidden, targets.head, token_weights, **how, **self._options
        )


def _marked_rows(token_ids: TokenIds, completion_mask: Mask, attention_mask: Mask) -> list[Row]:
    """Sequences without their pads."""
    whole = whole_numbers(token_ids, "input")
    if attention_mask is None:
        attention_mask = [[1] * len(ids) for ids in whole]
    scored = marked_runs(completion_mask, whole, "input", "completion_mask")
    real = marked_runs(attention_mask, whole, "input", "attention_mask")
    rows = []
    for number, (ids, runs, kept) in enumerate(zip(whole, scored, real, strict=True)):
        if len(kept) != 1:
            raise InputError(
                f"attention_mask must mark tokens that stand next to each other, got {len(kept)} "
                f"runs of them in row {number}"
            )
        (start, length), own = kept[0], [(at - kept[0][0], n) for at, n in runs]
        if not own or own[0][0] < 1 or sum(own[-1]) > length:
            raise InputError(
                f"completion_mask must mark real tokens behind the first one, got {runs} (start, "
                f"length) in row {number}, whose real tokens are {kept[0]}; leave out sequences "
                f"without a completion"
            )
        rows.append(Row(ids[start : start + length], own))
    return rows


def _scoring(episodes: Sequence[Episode], token_weights: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The divergence's weights, and the options of `linear_divergence` that episodes ask for.

    What is the same for all of them stays a number: it costs no more than one divergence does.
    """
    lengths = torch.tensor(scored_tokens(episodes))

    def of_tokens(values: list[float]) -> Tensor:
        # Wrappers move a module's tensors to its device, the weights among them.
        return uploaded(torch.tensor(values).repeat_interleave(lengths), token_weights.device)

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
