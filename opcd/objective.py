"""The divergence between two models, from their hidden states: where opcd meets opcd_kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opcd.errors import InputError
from opcd.lm import Head, causal_lm, completion_hidden, head_of
from opcd_kernels import LinearDivergence, linear_divergence, reference


def head_divergence(
    student_hidden: Tensor,  # (N, D_s)
    student: Head,
    teacher_hidden: Tensor,  # (N, D_t)
    teacher: Head,
    token_weights: Tensor | None = None,  # (N,); default 1/N each
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
) -> LinearDivergence:
    """`linear_divergence` over the rows that both heads have."""
    return linear_divergence(
        student_hidden,
        student.weight,
        teacher_hidden,
        teacher.weight,
        token_weights,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        student_bias=student.bias,
        teacher_bias=teacher.bias,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
        vocab_size=min(len(student.weight), len(teacher.weight)),
    )


@torch.no_grad()
def check_head(model: torch.nn.Module, token_ids: Sequence[int]) -> None:
    """Raise InputError if hidden states and `head_of` do not give the model's own logits.

    `token_ids` are any three tokens or more of the model's vocabulary.
    """
    lm, head = causal_lm(model), head_of(model)
    ids = torch.tensor([list(token_ids)], device=lm.device)
    expected = lm(input_ids=ids, use_cache=False).logits[0, :-1].float()
    hidden = completion_hidden(model, [token_ids[:1]], [token_ids[1:]])
    ours = reference.logits(hidden.to(head.weight.dtype), head.weight, head.bias, head.softcap)
    error, size = (ours.float() - expected).abs().max().item(), expected.abs().max().item()
    if not error <= 0.02 * max(size, 1.0):
        raise InputError(
            f"the logits of {type(lm).__name__} must be softcap(scale · lm_head(hidden)), but they "
            f"differ from that by {error:.3g} (largest logit {size:.3g}); this architecture is not "
            f"supported"
        )
