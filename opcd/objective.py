"""The divergence between two models, from their hidden states: where opcd meets opcd_kernels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opcd.models.head import Head
from opcd.runtime.upload import uploaded
from opcd_kernels import LinearDivergence, linear_divergence, reference, sizes

ROWS, BLOCK = 1024, 16_384  # tokens, and entries of the vocabulary, whose logits are there at once

Losses = LinearDivergence
Divergence = Callable[..., Losses]  # of arguments as those of `head_divergence`


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
    return sizes.scratch_bytes(tokens, student, teacher, dtype)


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


def vocabulary_logprobs(
    hidden: Tensor,  # (N, D)
    head: Head,
    vocab_size: int,  # entries of the vocabulary that count, from the first on
    temperature: float = 1.0,
) -> Tensor:  # (N, V)
    """log softmax over the whole vocabulary, in fp32 whatever the head is kept in.

    With gradients where they are enabled; of few rows at a time, as it holds all logits.
    """
    bias = None if head.bias is None else head.bias[:vocab_size].float()
    weight = head.weight[:vocab_size].float()
    with torch.autocast(hidden.device.type, enabled=False):
        logits = reference.logits(hidden.float(), weight, bias, head.softcap, temperature)
        return logits.log_softmax(-1)


def head_logprobs(
    hidden: Tensor,  # (N, D)
    head: Head,
    token_ids: Tensor,  # (N,) int64
    vocab_size: int,  # entries of the vocabulary that count, from the first on
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities of tokens, fp32, in nats, and (N,) whether each is the likeliest.

    In fp32 whatever the head is kept in, a block of the vocabulary at a time.
    """
    n = len(hidden)
    total = torch.full((n,), -torch.inf, device=hidden.device)
    highest, own = total.clone(), total.clone()
    blocks = [(at, min(at + BLOCK, vocab_size)) for at in range(0, vocab_size, BLOCK)]
    for begin, end in blocks:
        weight = head.weight[begin:end].float()
        bias = None if head.bias is None else head.bias[begin:end].float()
        for rows in torch.arange(n, device=hidden.device).split(ROWS):
            logits = reference.logits(hidden[rows].float(), weight, bias, head.softcap, temperature)
            total[rows] = torch.logaddexp(total[rows], logits.logsumexp(1))
            highest[rows] = torch.maximum(highest[rows], logits.amax(1))
            ids = token_ids[rows] - begin
            here = (ids >= 0) & (ids < end - begin)
            found = logits.gather(1, ids.clamp(0, end - begin - 1)[:, None])[:, 0]
            own[rows] = torch.where(here, found, own[rows])
    return own - total, own >= highest
