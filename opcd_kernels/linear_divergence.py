"""Exact divergence between student and teacher, from hidden states and lm_head weights.

The public function checks its arguments and hands them to one custom operator (`autograd.py`),
which forms the loss and its gradients in a single pass over chunks of tokens (`chunks.py`).

    gradient with respect to the student's logits z_s, for D_i at token i
      reverse KL   p_s (log p_s − log p_t − D_i)
      forward KL   p_s − p_t
      JSD(β)       (1−β) p_s [(log p_s − log m) − KL(p_s ‖ m)],   m = (1−β) p_s + β p_t
      −log p_s(y)  p_s − onehot(y)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from opcd_kernels.arguments import (
    check_choice,
    check_count,
    check_head,
    check_number,
    check_pair,
    check_untransformed,
    checked_forward_shares,
    checked_of_tokens,
    checked_target_ids,
    checked_token_weights,
    checked_vocab_size,
)
from opcd_kernels.autograd import AddingWeightGrad, operator
from opcd_kernels.backends import BACKENDS, check_backend
from opcd_kernels.chunks import Gradients, Inputs, Result, Work, is_plain
from opcd_kernels.options import DIVERGENCES, Options
from opcd_kernels.weight_grad import check_weight_grad


class LinearDivergence(NamedTuple):
    """What `linear_divergence` returns; all but the loss (N,), fp32, nats, detached."""

    loss: Tensor  # () fp32, differentiable in student_hidden, student_weight, student_bias
    per_token: Tensor  # the divergence, of a mixture the mixture
    student_entropy: Tensor
    reverse_kl: Tensor | None  # where it was computed: as the divergence, or for a mixture
    forward_kl: Tensor | None  # likewise
    logprobs: Tensor | None  # log p_s(target_ids), where there are target_ids


def linear_divergence(
    student_hidden: Tensor,  # (N, D_s) or (B, T, D_s), which is flattened
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N, D_t) or (B, T, D_t); no gradient
    teacher_weight: Tensor,  # (V_t, D_t); no gradient
    token_weights: Tensor | None = None,  # (N,) or (B, T); 0 drops a token; default 1/N each
    *,
    divergence: str = "reverse_kl",
    forward_share: float | Tensor = 0.0,  # or (N,) or (B, T), within [0, 1]
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,  # (V_s,)
    teacher_bias: Tensor | None = None,  # (V_t,)
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    target_ids: Tensor | None = None,  # (N,) or (B, T) int64
    logprob_weights: Tensor | None = None,  # (N,) or (B, T), of −log p_s(target_ids)
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
    add_weight_grad: bool = False,
) -> LinearDivergence:
    """Σ_i token_weights_i · D_i between two language-model heads, summed over the whole vocabulary.

    The divergence D is KL(student ‖ teacher) ("reverse_kl"), KL(teacher ‖ student) ("forward_kl")
    or "jsd". With ``forward_share`` a it is (1 − a) · reverse KL + a · forward KL, a number for all
    tokens or a tensor with one a token, and both come out; a number 0 or 1 is either KL itself, and
    computes that alone. ``logprob_weights`` c adds Σ c_i · (−log p_s(target_ids_i)): cross-entropy,
    or a policy gradient with advantages c; ``target_ids`` alone gives their log-probabilities.

    Equals ``reference.divergence`` of ``reference.logits`` of both models, weighted and summed.
    ``token_weights`` is the only reduction: a mask, a per-sequence mean, a global token count are
    all one vector; it has no gradient. A token of weight 0 has no divergence: the teacher's hidden
    state may be anything, the outputs are 0. Where its logprob weight is 0 too, it is left out: its
    hidden states and target may be anything, all its outputs are 0. Weights on the CPU save all of
    its work, and the teacher's product where no token has a divergence; weights on a GPU are not
    waited for, and save all but the products. ``vocab_size`` uses the first rows of both heads and
    is required where their numbers of rows differ. A sharded head (DTensor, FSDP2) is gathered
    once a call and its gradient averaged over the mesh, as FSDP averages.

    Numerics: operands in the student's dtype (or autocast's), products accumulated and kept in
    fp32, the head's gradient accumulated in fp32. A token that the teacher holds impossible and the
    student does not has divergence inf, and a gradient only with a share of 1. fp64 inputs compute
    in fp64 throughout. Gradients are formed during the forward pass, so a second derivative is not
    available.

    ``chunk_tokens`` tokens at a time hold the gradient in the logits, 2 bytes a token and entry of
    the vocabulary in 16 bits, and on a GPU some hundred of them both models' logits, 8 bytes an
    entry; by default as many as fit max(3 %, min(5 %, 1.3 GB)) of the GPU's memory. On a CPU all of
    them hold logits, by default 128 MiB. ``backend`` names who computes (`backends.py`): "torch",
    "triton" or "triton_dual", which keeps no logits at all and needs bf16 without bias, softcap,
    mixture and targets; "auto" is "torch" on a CPU and on a GPU whichever of the other two was
    measured to be faster, by ``python -m opcd_kernels.tune`` there or by ``make bench``.

    ``add_weight_grad`` adds the head's gradient to ``student_weight.grad`` while the forward pass
    forms it, and leaves nothing of it to backward: one buffer of the head's size and two passes
    over it less. It is for a training loop that calls ``loss.backward()`` exactly once, unscaled,
    with no ``zero_grad`` in between: backward raises RuntimeError for any other gradient than 1 (on
    a GPU a device-side assertion), a second time, and where ``.grad`` was replaced. It takes an
    fp32 parameter without hooks and fp16 nowhere in the products, one process, no DDP, no
    torch.compile, no activation checkpointing around the call, all of which are refused. The
    gradients of hidden states and bias go through autograd as always. Without gradients (no_grad)
    it has no effect.

    ``temperature`` τ divides both models' logits (z/τ, after bias and softcap) and nothing else:
    multiply token weights by τ² for gradients of the size of τ = 1. ``beta`` is the teacher's share
    of the JSD's mixture m = β p_t + (1 − β) p_s, and of its sum. A softcap c makes c · tanh(z/c) of
    that model's logits.

    Raises RuntimeError under torch.func's transforms and in forward mode, which autograd does not
    do through it, and ValueError for shapes, dtypes, devices or options that do not fit together,
    and for shares and targets out of range (on a GPU a device-side assertion: nothing waits).
    Source of the objective: arXiv 2602.12275.
    """
    check_untransformed(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, token_weights
    )
    parameter, one_head = student_weight, teacher_weight is student_weight
    student_weight, student_bias = _gathered(student_weight), _gathered(student_bias)
    teacher_weight = student_weight if one_head else _gathered(teacher_weight)
    teacher_bias = _gathered(teacher_bias)
    check_number("temperature", temperature)
    for name, value in (("student_softcap", student_softcap), ("teacher_softcap", teacher_softcap)):
        if value is not None:
            check_number(name, value)
    check_choice("divergence", divergence, DIVERGENCES)
    check_choice("backend", backend, BACKENDS)
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, got {beta}; use a KL instead")
    if chunk_tokens is not None:
        check_count("chunk_tokens", chunk_tokens)
        chunk_tokens = int(chunk_tokens)
    check_head("student", student_hidden, student_weight, student_bias)
    check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    check_pair(student_hidden, teacher_hidden)
    vocab_size = checked_vocab_size(vocab_size, student_weight.shape[0], teacher_weight.shape[0])
    kind, shares = checked_forward_shares(forward_share, divergence, student_hidden)
    weights = checked_token_weights(token_weights, student_hidden)
    if target_ids is not None:
        target_ids = checked_target_ids(target_ids, student_hidden)
    if logprob_weights is not None:
        if target_ids is None:
            raise ValueError(
                "logprob_weights must come with target_ids, got none; pass the ids of the tokens"
            )
        logprob_weights = checked_of_tokens("logprob_weights", logprob_weights, student_hidden)
    compute_dtype = _compute_dtype(student_hidden, student_weight)
    options = Options(
        *(kind, float(beta), float(temperature)),
        *(student_softcap, teacher_softcap, vocab_size),
    )
    adds = add_weight_grad and torch.is_grad_enabled()
    if adds:
        check_weight_grad(parameter, compute_dtype)

    inputs = Inputs(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        student_bias,
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]).detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        weights,
        shares,
        target_ids,
        logprob_weights,
    )
    plain = is_plain(inputs, options)
    check_backend(backend, student_hidden.device, compute_dtype, plain)
    wanted = (torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs[:3])
    work = Work(chunk_tokens, compute_dtype, backend, Gradients(*wanted))
    if adds:
        result = Result(*AddingWeightGrad.apply(*inputs[:3], inputs, options, work))
    else:
        result = Result(*operator(*inputs, *options, *work[:3], list(work.need)))
    per_token, entropy, reverse_kl, forward_kl, logprobs = (x.detach() for x in result[1:6])
    return LinearDivergence(
        result.loss,
        per_token,
        entropy,
        {"reverse_kl": per_token, "mixture": reverse_kl}.get(kind),
        {"forward_kl": per_token, "mixture": forward_kl}.get(kind),
        None if target_ids is None else logprobs,
    )


def _gathered(x: Any) -> Any:
    """A sharded head whole, on every rank; its gradient is averaged over the ranks and sharded."""
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    mean = [Partial("avg")] * x.device_mesh.ndim
    return x.full_tensor(grad_placements=mean)


def _compute_dtype(h_s: Tensor, w_s: Tensor) -> torch.dtype:
    """What the operands of the products are rounded to."""
    device_type = h_s.device.type
    if h_s.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.promote_types(h_s.dtype, w_s.dtype)
