"""The divergence between two models, from their hidden states: where opcd meets opcd_kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opcd.errors import InputError
from opcd.models.lm import Head, causal_lm, head_of, transformer
from opcd.runtime.upload import uploaded
from opcd_kernels import LinearDivergence, linear_divergence, reference

Losses = LinearDivergence


class Targets(NamedTuple):
    """What a student is held against: a teacher's hidden states and the head they belong to."""

    hidden: Tensor  # (N, D): the hidden state that predicts each scored token
    lengths: tuple[int, ...]  # B: scored tokens of each sequence, N in all
    head: Head

    @property
    def cu_seqlens(self) -> Tensor:  # (B + 1,) int64: where each sequence's rows start
        """The lengths as `FlashAttention` and others write them."""
        return uploaded(torch.tensor([0, *self.lengths]).cumsum(0), self.hidden.device)

    def of(self, sequences: Sequence[int]) -> "Targets":
        """Those of some sequences, in that order."""
        parts = self.hidden.split([*self.lengths])
        lengths = tuple(self.lengths[i] for i in sequences)
        return Targets(torch.cat([parts[i] for i in sequences]), lengths, self.head)


def head_divergence(
    student_hidden: Tensor,  # (N, D_s)
    student: Head,
    teacher_hidden: Tensor,  # (N, D_t)
    teacher: Head,
    token_weights: Tensor | None = None,  # (N,); default 1/N each
    **options: Any,
) -> Losses:
    """`linear_divergence`, with its options, over the rows that both heads have."""
    return linear_divergence(
        student_hidden,
        student.weight,
        teacher_hidden,
        teacher.weight,
        token_weights,
        student_bias=student.bias,
        teacher_bias=teacher.bias,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
        vocab_size=min(len(student.weight), len(teacher.weight)),
        **options,
    )


@torch.no_grad()
def check_head(model: torch.nn.Module, token_ids: Sequence[int]) -> None:
    """Raise InputError if hidden states and `head_of` do not give the model's own logits.

    Both come from one pass, so that they differ by the rounding of the head's product alone.
    """
    lm, head = causal_lm(model), head_of(model)
    rows = lm.get_input_embeddings().num_embeddings
    if max(token_ids) >= rows:
        raise InputError(
            f"{type(lm).__name__} must have an embedding for every token of the tokenizer, got "
            f"{rows} embeddings and token {max(token_ids)}; resize the embeddings, or use the "
            f"model's own tokenizer"
        )
    seen: list[Tensor] = []
    hook = transformer(model).register_forward_hook(lambda *x: seen.append(x[-1].last_hidden_state))
    ids = torch.tensor([list(token_ids)], device=lm.device)
    expected = lm(input_ids=ids, use_cache=False).logits[0].float()
    hook.remove()
    hidden = (seen[0][0] * head.scale).to(head.weight.dtype)
    ours = reference.logits(hidden, head.weight, head.bias, head.softcap).float()
    error, size = (ours - expected).abs().max().item(), expected.abs().max().item()
    if not error <= 0.02 * max(size, 1.0):
        raise InputError(
            f"the logits of {type(lm).__name__} must be softcap(scale · lm_head(hidden)), but they "
            f"differ from that by {error:.3g} (largest logit {size:.3g}); this architecture is not "
            f"supported"
        )
