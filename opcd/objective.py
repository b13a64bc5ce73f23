"""The divergence between two models, from their hidden states: where opcd meets opcd_kernels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opcd.models.head import Head
from opcd.runtime.upload import uploaded
from opcd_kernels import LinearDivergence, chunks, linear_divergence

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


def scratch_bytes(tokens: int, student: Tensor, teacher: Tensor, dtype: torch.dtype) -> int:
    """Memory that `head_divergence` takes while it works, of that many tokens in `dtype`."""
    return chunks.scratch_bytes(tokens, student, teacher, dtype)


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
