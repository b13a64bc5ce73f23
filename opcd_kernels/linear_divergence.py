"""Exact divergence between student and teacher, from hidden states and lm_head weights.

The public function checks its arguments and hands them to one custom operator, which forms the loss
and its gradients in a single pass over chunks of tokens (`chunks.py`). Because the token weights
are an input, nothing is left for backward but to scale those gradients, and torch.compile sees one
opaque operation.

    gradient with respect to the student's logits z_s, for D_i at token i
      reverse KL   p_s (log p_s − log p_t − D_i)
      forward KL   p_s − p_t
      JSD(β)       (1−β) p_s [(log p_s − log m) − KL(p_s ‖ m)],   m = (1−β) p_s + β p_t
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
    checked_token_weights,
    checked_vocab_size,
)
from opcd_kernels.backends import BACKENDS, check_backend, chosen_backend
from opcd_kernels.chunks import Gradients, Result, empty_result, loss_and_gradients
from opcd_kernels.options import DIVERGENCES, Options

_SCALED_BYTES = 8 * 2**20  # of a gradient scaled at once


class LinearDivergence(NamedTuple):
    """What `linear_divergence` returns."""

    loss: Tensor  # () fp32, differentiable in student_hidden, student_weight, student_bias
    per_token: Tensor  # (N,) fp32 nats, detached
    student_entropy: Tensor  # (N,) fp32 nats, detached


def linear_divergence(
    student_hidden: Tensor,  # (N, D_s) or (B, T, D_s), which is flattened
    student_weight: Tensor,  # (V_s, D_s)
    teacher_hidden: Tensor,  # (N, D_t) or (B, T, D_t); no gradient
    teacher_weight: Tensor,  # (V_t, D_t); no gradient
    token_weights: Tensor | None = None,  # (N,) or (B, T); 0 drops a token; default 1/N each
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,  # (V_s,)
    teacher_bias: Tensor | None = None,  # (V_t,)
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> LinearDivergence:
    """Σ_i token_weights_i · D_i between two language-model heads, summed over the whole vocabulary.

    Equals ``reference.divergence`` of ``reference.logits`` of both models, weighted and summed.
    ``token_weights`` is the only reduction: a mask, a per-sequence mean, a global token count are
    all one vector; it has no gradient. A token of weight 0 is left out: its hidden states may be
    anything, its outputs are 0. Weights on the CPU save all of its work; weights on a GPU are not
    waited for, and save all but its products. ``vocab_size`` uses the first rows of both heads and
    is required where their numbers of rows differ. A sharded head (DTensor, FSDP2) is gathered
    once a call and its gradient averaged over the mesh, as FSDP averages.

    Numerics: operands in the student's dtype (or autocast's), products accumulated and kept in
    fp32, the head's gradient accumulated in fp32. A token that the teacher holds impossible and the
    student does not has divergence inf. fp64 inputs compute in fp64 throughout. Gradients are
    formed during the forward pass, so a second derivative is not available.

    ``chunk_tokens`` tokens at a time hold logits, 8 bytes a token and vocabulary entry; by default
    as many as fit 3 % of the GPU's memory, or 128 MiB on a CPU. ``backend`` names who computes
    (`backends.py`): "torch", "triton" or "triton_dual", which keeps no logits at all, takes half
    the memory and needs bf16 without bias and softcap; "auto" is "torch" on a CPU and on a GPU
    whichever of the other two was measured to be faster.

    Raises ValueError for shapes, dtypes, devices or options that do not fit together.
    Source of the objective: arXiv 2602.12275.
    """
    student_weight, student_bias = _gathered(student_weight), _gathered(student_bias)
    teacher_weight, teacher_bias = _gathered(teacher_weight), _gathered(teacher_bias)
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
    check_head("student", student_hidden, student_weight, student_bias)
    check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    check_pair(student_hidden, teacher_hidden)
    vocab_size = checked_vocab_size(vocab_size, student_weight.shape[0], teacher_weight.shape[0])
    weights = checked_token_weights(token_weights, student_hidden)
    compute_dtype = _compute_dtype(student_hidden, student_weight)
    extras = (student_bias, teacher_bias, student_softcap, teacher_softcap)
    plain = all(x is None for x in extras)
    check_backend(backend, student_hidden.device, compute_dtype, plain)

    h_s = student_hidden.reshape(-1, student_hidden.shape[-1])
    h_t = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    loss, per_token, entropy, *_ = _operator(
        h_s,
        student_weight,
        student_bias,
        h_t.detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        weights,
        divergence,
        float(beta),
        float(temperature),
        student_softcap,
        teacher_softcap,
        vocab_size,
        chunk_tokens,
        compute_dtype,
        backend,
        [
            torch.is_grad_enabled() and x is not None and x.requires_grad
            for x in (h_s, student_weight, student_bias)
        ],
    )
    return LinearDivergence(loss, per_token.detach(), entropy.detach())


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


@torch.library.custom_op("opcd_kernels::linear_divergence", mutates_args=())
def _operator(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    token_weights: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    vocab_size: int,
    chunk_tokens: int | None,
    compute_dtype: torch.dtype,
    backend: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "auto":  # here, where torch.compile does not trace
        extras = (student_bias, teacher_bias, student_softcap, teacher_softcap)
        backend = chosen_backend(
            student_hidden.device,
            compute_dtype,
            all(x is None for x in extras),
            (vocab_size, student_hidden.shape[1]),
            "trained" if need[1] else "frozen",
        )
    with torch.autocast(student_hidden.device.type, enabled=False):
        return loss_and_gradients(
            student_hidden,
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            token_weights,
            Options(divergence, beta, temperature, student_softcap, teacher_softcap, vocab_size),
            Gradients(*need),
            compute_dtype,
            backend,
            chunk_tokens,
        )


@_operator.register_fake
def _(
    student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, *args: Any
) -> Result:
    return empty_result(student_hidden, student_weight, student_bias, Gradients(*args[-1]))


def _save_gradients(ctx: Any, inputs: tuple, output: tuple) -> None:
    result = Result(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*result[1:])
    ctx.save_for_backward(result.grad_hidden, result.grad_weight, result.grad_bias, result.scale)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.need = inputs[-1]


def _scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_divergence has no second derivative: its gradient is formed in the forward "
            "pass; call backward or autograd.grad without create_graph"
        )
    *grads, scale = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 17
    scaled = [
        _scaled(grad, grad_loss * scale, dtype) if needed else None
        for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.need, strict=True)
    ]
    return (*scaled, *(None,) * 14)


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · factor in the factor's precision, rounded to `dtype` once, a part at a time."""
    if grad.dtype == dtype == factor.dtype:
        return grad * factor
    out = torch.empty_like(grad, dtype=dtype)
    rows = max(1, _SCALED_BYTES // (factor.dtype.itemsize * max(1, grad[:1].numel())))
    for part, source in zip(out.split(rows), grad.split(rows), strict=True):
        part.copy_(source.to(factor.dtype) * factor)
    return out


_operator.register_autograd(_scale_gradients, setup_context=_save_gradients)
