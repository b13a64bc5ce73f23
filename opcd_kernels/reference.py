"""The definitions, in plain PyTorch: the specification and the oracle of every test.

Written from the formulas, with full logits and ordinary autograd; use fp64 where digits matter.
Imports nothing else of this package.
"""

import torch
from torch import Tensor


def logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:  # (N, V)
    """``softcap(hidden @ weight.T + bias) / temperature``, where softcap(x) = c tanh(x / c)."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def kl(logprobs_p: Tensor, logprobs_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p (log p − log q), with 0 log 0 = 0; (N, V) and (N, V) to (N,)."""
    support = logprobs_p > -torch.inf
    ratio = torch.where(support, logprobs_p, 0) - torch.where(support, logprobs_q, 0)
    return (logprobs_p.exp() * ratio).sum(-1)


def divergence(
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    forward_share: float | Tensor = 0.0,  # or (N,)
) -> Tensor:  # (N,) nats
    """Per-token divergence between softmax(student_logits) and softmax(teacher_logits).

    ``reverse_kl`` is KL(student ‖ teacher), ``forward_kl`` is KL(teacher ‖ student), ``jsd`` is
    β KL(teacher ‖ m) + (1−β) KL(student ‖ m) with m = (1−β) student + β teacher. A
    ``forward_share`` a mixes: (1−a) KL(student ‖ teacher) + a KL(teacher ‖ student).
    """
    s = student_logits.log_softmax(-1)
    t = teacher_logits.log_softmax(-1)
    if divergence == "reverse_kl":
        if isinstance(forward_share, Tensor) or forward_share != 0:
            return (1 - forward_share) * kl(s, t) + forward_share * kl(t, s)
        return kl(s, t)
    if divergence == "forward_kl":
        return kl(t, s)
    if divergence == "jsd":
        weights = torch.tensor([1 - beta, beta], dtype=s.dtype, device=s.device).log()
        m = torch.logsumexp(torch.stack([s + weights[0], t + weights[1]]), dim=0)
        return beta * kl(t, m) + (1 - beta) * kl(s, m)
    raise ValueError(f"divergence must be reverse_kl, forward_kl or jsd, got {divergence!r}")


def entropy(student_logits: Tensor) -> Tensor:  # (N, V) → (N,) nats
    """Entropy of softmax(student_logits)."""
    s = student_logits.log_softmax(-1)
    return -(s.exp() * torch.where(s > -torch.inf, s, 0)).sum(-1)


def logprobs(student_logits: Tensor, target_ids: Tensor) -> Tensor:  # (N, V), (N,) → (N,) nats
    """log softmax(student_logits) of one token a row; its negative is the cross-entropy."""
    return student_logits.log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]
