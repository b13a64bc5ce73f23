"""The divergence as the paper's public code computes it: over the student's 256 likeliest tokens.

    D = Σ_{v in the student's top 256} p_s(v) (log p_s(v) − log p_t(v))

with the probabilities of the whole softmax, neither renormalised over those tokens nor with a term
for the others (arXiv 2602.12275 and its code). A student can lower it by moving probability out of
the set, which the exact sum does not reward: this is here to be measured against.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opcd.models.head import Head
from opcd.objective import Losses, vocabulary_logprobs

TOP, ROWS = 256, 256  # tokens of the vocabulary; positions whose logits are there at once


def top_divergence(
    student_hidden: Tensor,  # (N, D_s)
    student: Head,
    teacher_hidden: Tensor,  # (N, D_t); no gradient
    teacher: Head,
    token_weights: Tensor,  # (N,)
    *,
    forward_share: float | Tensor = 0.0,
    temperature: float = 1.0,
    add_weight_grad: bool = False,  # autograd adds it
) -> Losses:
    """In place of `head_divergence`, for a student's own completions; in fp32.

    `per_token` is the truncated sum, `reverse_kl` the exact one, of which the loss knows nothing.
    """
    assert not isinstance(forward_share, Tensor), "one for all"
    assert forward_share == 0, "reverse KL alone"
    rows = min(len(student.weight), len(teacher.weight))

    def of_rows(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = vocabulary_logprobs(ours, student, rows, temperature)
        with torch.no_grad():
            t = vocabulary_logprobs(theirs, teacher, rows, temperature)
            exact, entropy = (s.exp() * (s - t)).sum(-1), -(s.exp() * s).sum(-1)
            top = s.topk(min(TOP, rows), -1).indices
        chosen = s.gather(-1, top)
        return (chosen.exp() * (chosen - t.gather(-1, top))).sum(-1), exact, entropy

    parts: list[Any] = [
        checkpoint(of_rows, ours, theirs, use_reentrant=False)
        for ours, theirs in zip(student_hidden.split(ROWS), teacher_hidden.split(ROWS), strict=True)
    ]
    kept, exact, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
    loss = (kept * token_weights.to(kept)).sum()
    return Losses(loss, kept.detach(), entropy.detach(), exact.detach(), None, None)
