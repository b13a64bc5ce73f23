"""Exact divergence between student and teacher, from hidden states and lm_head weights.

The chunked PyTorch backend. For each chunk of tokens both models' logits are formed in fp32, the
per-token divergence and its gradient with respect to the student's logits follow in closed form,
and the gradient is multiplied back into the hidden states and the head at once. Nothing of shape
(N, V) is ever kept: the scratch is a handful of (chunk, V) buffers, whatever N is.

    gradient with respect to the student's logits z_s, for D_i at token i
      reverse KL   p_s (log p_s − log p_t − D_i)
      forward KL   p_s − p_t
      JSD(β)       (1−β) p_s [(log p_s − log m) − KL(p_s ‖ m)],   m = (1−β) p_s + β p_t

Numerics: student and teacher are nearly equal during distillation, so log p_s − log p_t cancels.
Logits are therefore accumulated and kept in fp32 also when the inputs are bf16, and each KL is
summed from terms that are never negative: q − p + p r with r = log p − log q, taken as
p (expm1(−r) + r) where |r| < 1.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
BACKENDS = ("auto", "torch")

_CPU_SCRATCH_BYTES = 400 * 2**20
_CUDA_SCRATCH_SHARE = 0.05
_SCRATCH_BUFFERS = 7  # (chunk, V) fp32 at the peak of a KL; a JSD takes nine


class LinearDivergence(NamedTuple):
    """What `linear_divergence` returns."""

    loss: Tensor  # () fp32, differentiable in student_hidden, student_weight, student_bias
    per_token: Tensor  # (N,) fp32 nats, detached
    student_entropy: Tensor  # (N,) fp32 nats, detached


class _Spec(NamedTuple):
    divergence: str
    beta: float
    temperature: float
    student_softcap: float | None
    teacher_softcap: float | None
    vocab_size: int
    chunk_tokens: int
    compute_dtype: torch.dtype  # of the operands of the products; logits are fp32 (fp64 for fp64)
    need_grad: bool


def linear_divergence(
    student_hidden: Tensor,  # (N, D_s) or (B, T, D_s)
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
    all one vector. ``vocab_size`` uses the first rows of both heads and is required where their
    numbers of rows differ.

    Numerics: operands in the inputs' dtype (or autocast's), products accumulated and kept in fp32,
    gradients of the head accumulated in fp32. Gradients are formed during the forward pass, so a
    second derivative is not available. fp64 inputs compute in fp64 throughout.

    Raises ValueError for shapes, dtypes or options that do not fit together.
    Source of the objective: arXiv 2602.12275.
    """
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must hold the same tokens as student_hidden "
            f"{tuple(student_hidden.shape[:-1])}, got {tuple(teacher_hidden.shape[:-1])}; pass the "
            f"hidden states of the same positions"
        )
    _check_head("student", student_hidden, student_weight, student_bias)
    _check_head("teacher", teacher_hidden, teacher_weight, teacher_bias)
    vocab_size = _check_vocab_size(vocab_size, student_weight.shape[0], teacher_weight.shape[0])
    _check_choice("divergence", divergence, DIVERGENCES)
    _check_choice("backend", backend, BACKENDS)
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie strictly between 0 and 1, got {beta}; use a KL instead")
    for name, value in (
        ("temperature", temperature),
        ("student_softcap", student_softcap),
        ("teacher_softcap", teacher_softcap),
        ("chunk_tokens", chunk_tokens),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")

    h_s = student_hidden.reshape(-1, student_hidden.shape[-1])
    h_t = teacher_hidden.reshape(-1, teacher_hidden.shape[-1])
    n = h_s.shape[0]
    high = torch.float64 if h_s.dtype == torch.float64 else torch.float32
    if token_weights is None:
        w = torch.full((n,), 1 / max(n, 1), dtype=high, device=h_s.device)
    else:
        if token_weights.numel() != n:
            raise ValueError(
                f"token_weights must hold one weight for each of the {n} tokens, got "
                f"{tuple(token_weights.shape)}; flatten it the way student_hidden is"
            )
        w = token_weights.detach().reshape(-1).to(high)

    device_type = h_s.device.type
    if h_s.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
    else:
        compute_dtype = torch.promote_types(h_s.dtype, student_weight.dtype)
    spec = _Spec(
        divergence,
        beta,
        temperature,
        student_softcap,
        teacher_softcap,
        vocab_size,
        chunk_tokens or _default_chunk_tokens(h_s.device, vocab_size),
        compute_dtype,
        torch.is_grad_enabled(),
    )
    with torch.autocast(device_type, enabled=False):
        loss, per_token, entropy = _LinearDivergence.apply(
            h_s, student_weight, student_bias, h_t, teacher_weight, teacher_bias, w, spec
        )
    return LinearDivergence(loss, per_token, entropy)


def _check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}_weight must be (V, D={hidden.shape[-1]}) like {name}_hidden, got "
            f"{tuple(weight.shape)}; pass the lm_head weight untransposed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}_bias must be (V={weight.shape[0]},), got {tuple(bias.shape)}; "
            f"pass the bias of the same lm_head"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise ValueError(
            f"{name}_hidden and {name}_weight must be floating point, got "
            f"{hidden.dtype} and {weight.dtype}; dequantize the head first"
        )
    if hidden.device != weight.device:
        raise ValueError(
            f"{name}_hidden and {name}_weight must be on one device, got "
            f"{hidden.device} and {weight.device}; move one of them"
        )


def _check_vocab_size(vocab_size: int | None, student_rows: int, teacher_rows: int) -> int:
    smaller = min(student_rows, teacher_rows)
    if vocab_size is None and student_rows != teacher_rows:
        raise ValueError(
            f"teacher_weight must have V={student_rows} rows like student_weight, got "
            f"{teacher_rows}; pass vocab_size={smaller} to use the shared rows"
        )
    if vocab_size is not None and not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size must be between 1 and {smaller}, the smaller head, got {vocab_size}; "
            f"pass the size of the tokenizer"
        )
    return vocab_size or student_rows


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


class _LinearDivergence(torch.autograd.Function):
    """Gradients are formed in forward, where the logits are; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        h_s: Tensor,
        w_s: Tensor,
        b_s: Tensor | None,
        h_t: Tensor,
        w_t: Tensor,
        b_t: Tensor | None,
        token_weights: Tensor,
        spec: _Spec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_h, need_w, need_b = (spec.need_grad and x for x in ctx.needs_input_grad[:3])
        need_grad = need_h or need_w or need_b
        n, v, high = h_s.shape[0], spec.vocab_size, token_weights.dtype
        teacher_dtype = _teacher_dtype(w_t, spec)
        w_s_low = _operand(w_s[:v], spec.compute_dtype, high)
        w_t_low = _operand(w_t[:v], teacher_dtype, high)
        per_token = torch.empty(n, dtype=high, device=h_s.device)
        entropy = torch.empty_like(per_token)
        grad_h = torch.empty_like(h_s) if need_h else None
        grad_w = torch.zeros(w_s.shape, dtype=high, device=w_s.device) if need_w else None
        grad_b = torch.zeros(w_s.shape[0], dtype=high, device=w_s.device) if need_b else None

        # The weights enter the products relative to the largest one: 1/N would underflow in fp16.
        scale = token_weights.abs().max() if n else token_weights.new_ones(())
        scale = torch.where(scale > 0, scale, 1)
        relative = (token_weights / scale)[:, None]
        dropped = relative == 0
        for start in range(0, n, spec.chunk_tokens):
            rows = slice(start, start + spec.chunk_tokens)
            h_s_low = _operand(h_s[rows], spec.compute_dtype, high)
            h_t_low = _operand(h_t[rows], teacher_dtype, high)
            z_s = _product(h_s_low, w_s_low.T, spec.compute_dtype, high)
            z_t = _product(h_t_low, w_t_low.T, teacher_dtype, high)
            z_s, slope = _finish_logits(z_s, b_s, spec.student_softcap, spec)
            z_t, _ = _finish_logits(z_t, b_t, spec.teacher_softcap, spec)
            per_token[rows], entropy[rows], dz = _divergence(z_s, z_t, spec, need_grad)
            if dz is None:
                continue
            dz.mul_(relative[rows])
            if slope is not None:
                dz.mul_(slope)
            # A token of weight 0 contributes nothing, even one that is infinite or not a number.
            dz.masked_fill_(dropped[rows], 0)
            h_s_low = h_s_low.masked_fill(dropped[rows], 0)
            if grad_b is not None:
                grad_b[:v] += dz.sum(0)
            dz_low = _operand(dz, spec.compute_dtype, high)
            if grad_h is not None:
                product = _product(dz_low, w_s_low, spec.compute_dtype, high)
                grad_h[rows] = product.mul_(scale / spec.temperature)
            if grad_w is not None:
                grad_w[:v] += _product(dz_low.T, h_s_low, spec.compute_dtype, high)

        for grad in (grad_w, grad_b):
            if grad is not None:
                grad.mul_(scale / spec.temperature)
        ctx.save_for_backward(grad_h, grad_w, grad_b)
        ctx.dtypes = (h_s.dtype, w_s.dtype, None if b_s is None else b_s.dtype)
        ctx.mark_non_differentiable(per_token, entropy)
        weighted = torch.where(token_weights == 0, 0, token_weights * per_token)
        return weighted.sum(), per_token, entropy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_divergence has no second derivative: its gradient is formed in the forward "
                "pass; call backward or autograd.grad without create_graph"
            )
        grad_loss = grad_outputs[0]
        grads = [
            None if g is None else (g * grad_loss).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None)


def _divergence(
    z_s: Tensor, z_t: Tensor, spec: _Spec, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per-token divergence, student entropy and gradient in z_s. Consumes both (C, V) buffers."""
    log_s = z_s.sub_(z_s.logsumexp(-1, keepdim=True))
    log_t = z_t.sub_(z_t.logsumexp(-1, keepdim=True))
    p_s = log_s.exp()
    entropy = torch.xlogy(p_s, p_s).sum(-1).neg_()
    if spec.divergence == "reverse_kl":
        value, ratio = _kl_(p_s, log_s, log_t)
        return value, entropy, p_s.mul_(ratio.sub_(value[:, None])) if need_grad else None
    p_t = log_t.exp()
    if spec.divergence == "forward_kl":
        value, _ = _kl_(p_t, log_t, log_s)
        return value, entropy, p_s.sub_(p_t) if need_grad else None
    beta = spec.beta
    log_m = torch.logaddexp(log_s + math.log(1 - beta), log_t + math.log(beta))
    kl_t, _ = _kl_(p_t, log_t, log_m.clone())
    kl_s, ratio = _kl_(p_s, log_s, log_m)
    dz = p_s.mul_(ratio.sub_(kl_s[:, None])).mul_(1 - beta) if need_grad else None
    return beta * kl_t + (1 - beta) * kl_s, entropy, dz


def _kl_(p: Tensor, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p ‖ q) and log p − log q (0 where p is 0), in the buffers of log_p and log_q."""
    ratio = log_p.sub_(log_q).masked_fill_(p == 0, 0)
    near = torch.expm1(-ratio).add_(ratio).mul_(p)
    far = log_q.exp_().sub_(p).addcmul_(p, ratio)
    is_near = (ratio.abs() < 1).logical_and_(p > 0)
    return torch.where(is_near, near, far, out=far).sum(-1), ratio


def _finish_logits(
    z: Tensor, bias: Tensor | None, softcap: float | None, spec: _Spec
) -> tuple[Tensor, Tensor | None]:
    """Bias, softcap and temperature in place; and the softcap's derivative where there is one."""
    if bias is not None:
        z += bias[: spec.vocab_size]
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z * z
        z.mul_(softcap)
    return (z if spec.temperature == 1 else z.div_(spec.temperature)), slope


def _teacher_dtype(weight: Tensor, spec: _Spec) -> torch.dtype:
    """The teacher's products run in the student's precision, never below its own weights'."""
    if spec.compute_dtype in (torch.float32, torch.float64):
        return torch.promote_types(weight.dtype, spec.compute_dtype)
    return spec.compute_dtype


def _operand(x: Tensor, low: torch.dtype, high: torch.dtype) -> Tensor:
    """x rounded to `low`. On a CPU it is held in `high`: products there return their own dtype."""
    x = x.to(low)
    return x if x.device.type == "cuda" else x.to(high)


def _product(a: Tensor, b: Tensor, low: torch.dtype, high: torch.dtype) -> Tensor:
    """a @ b of operands rounded to `low`, accumulated and returned in `high` (fp32 or fp64)."""
    if a.dtype != high:
        return torch.mm(a, b, out_dtype=high)
    with _bf16_products(low):
        return a @ b


@contextlib.contextmanager
def _bf16_products(low: torch.dtype) -> Iterator[None]:
    """Let oneDNN multiply fp32 copies of bf16 values in bf16: same fp32 sums, twice the speed."""
    matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if low != torch.bfloat16 or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _default_chunk_tokens(device: torch.device, vocab_size: int) -> int:
    if device.type == "cuda":
        budget = _CUDA_SCRATCH_SHARE * torch.cuda.get_device_properties(device).total_memory
    else:
        budget = _CPU_SCRATCH_BYTES
    tokens = int(budget / (_SCRATCH_BUFFERS * 4 * vocab_size))
    return tokens // 128 * 128 if tokens >= 128 else max(1, tokens)
