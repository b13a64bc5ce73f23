"""Divergence of rows of logits in plain PyTorch, a few rows at a time so that they stay in cache.

Each KL is summed from terms that are never negative, q − p + p r with r = log p − log q, taken as
p (expm1(−r) + r): the plain sum of p r loses its digits, and its sign, where student and teacher
are nearly equal.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from opcd_kernels.options import Options

_CPU_BLOCK = 2**19  # logits of one model handled at once: four buffers of 2 MiB
_BLOCK = 2**24
_BUFFERS = 4
_USUAL = -60.0  # log p − log q above which p e^{−r} is q to the last digit that counts
_LOG_ZERO = -1e4  # stands for log p where p is 0, as exp(-1e4) is exactly: 0 · −inf is not a number


def row_width(v: int) -> int:
    """Columns of a row of logits."""
    return v


def divergence_rows_(
    student_logits: Tensor,  # (C, V) fp32 or fp64, without bias; its memory takes the gradient
    teacher_logits: Tensor,  # (C, V); its memory is used up
    student_bias: Tensor | None,  # (V,)
    teacher_bias: Tensor | None,  # (V,)
    factors: Tensor,  # (C,) what each row's gradient is multiplied with; 0 drops the row
    options: Options,
    need_grad: bool,
    compute_dtype: torch.dtype,  # the products round the gradient themselves
) -> tuple[Tensor, Tensor, Tensor]:  # per_token (C,), student_entropy (C,), dz (C, V)
    """Everything that happens to a chunk's logits; dz lies in the student's, unrounded."""
    c, v = student_logits.shape
    on_cpu = student_logits.device.type == "cpu"
    block = max(1, (_CPU_BLOCK if on_cpu else _BLOCK) // v)
    work = student_logits.new_empty(_BUFFERS, min(block, c), v)
    value, entropy = torch.empty_like(factors), torch.empty_like(factors)
    for start in range(0, c, block):
        rows = slice(start, start + block)
        s, t = student_logits[rows], teacher_logits[rows]
        buffers = work[:, : len(s)].unbind(0)
        slope = _finish_(s, student_bias, options.student_softcap, options, buffers[3])
        _finish_(t, teacher_bias, options.teacher_softcap, options, None)
        _block_(s, t, value[rows], entropy[rows], buffers, options)
        if need_grad:
            if slope is not None:
                s.mul_(slope)
            s.mul_(factors[rows, None])
    if not on_cpu:  # there, dropped tokens never come this far
        dropped = factors == 0
        value.masked_fill_(dropped, 0)
        entropy.masked_fill_(dropped, 0)
        student_logits.masked_fill_(dropped[:, None], 0)
    return value, entropy, student_logits


def _finish_(
    z: Tensor, bias: Tensor | None, softcap: float | None, options: Options, slope: Tensor | None
) -> Tensor | None:
    """Bias, softcap and temperature in place; the softcap's derivative into `slope`."""
    if bias is not None:
        z += bias
    if softcap is not None:
        z.div_(softcap).tanh_()
        if slope is not None:
            torch.mul(z, z, out=slope).neg_().add_(1)
        z.mul_(softcap)
    if options.temperature != 1:
        z.div_(options.temperature)
    return None if softcap is None else slope


def _block_(
    s: Tensor,
    t: Tensor,
    value: Tensor,
    entropy: Tensor,
    buffers: tuple[Tensor, ...],
    options: Options,
) -> None:
    """Fill value and entropy (R,) and leave the gradient in s (R, V)."""
    a, b, c, _ = buffers
    log_s, log_t = torch.log_softmax(s, -1, out=a), torch.log_softmax(t, -1, out=b)
    p_s = torch.exp(log_s, out=s)
    entropy.copy_(torch.clamp(log_s, min=_LOG_ZERO, out=c).mul_(p_s).sum(-1)).neg_()
    if options.divergence == "reverse_kl":
        ratio = log_s.clamp_(min=_LOG_ZERO).sub_(log_t)
        value.copy_(_kl(p_s, ratio, log_t, c))
        p_s.mul_(ratio.sub_(value[:, None]))
    elif options.divergence == "forward_kl":
        p_t = torch.exp(log_t, out=t)
        ratio = log_t.clamp_(min=_LOG_ZERO).sub_(log_s)
        value.copy_(_kl(p_t, ratio, log_s, c))
        p_s.sub_(p_t)
    else:
        # With x = log(β p_t / (1−β) p_s): log m = log (1−β) p_s + softplus(x), or with t and −x.
        beta, rest = options.beta, 1 - options.beta
        p_t = torch.exp(log_t, out=t)
        log_s.clamp_(min=_LOG_ZERO)
        x = log_t.clamp_(min=_LOG_ZERO).sub(log_s).add_(math.log(beta / rest))
        over_s, over_t = softplus(x, threshold=50), softplus(-x, threshold=50)
        log_m = log_s.add_(over_s).add_(math.log(rest))
        kl_s = _kl(p_s, -math.log(rest) - over_s, log_m, c)
        kl_t = _kl(p_t, -math.log(beta) - over_t, log_m, c)
        value.copy_(beta * kl_t + rest * kl_s)
        center = torch.mul(p_s, over_s, out=c).sum(-1, keepdim=True)
        p_s.mul_(over_s.sub_(center)).mul_(-rest)


def _kl(p: Tensor, ratio: Tensor, log_q: Tensor, work: Tensor) -> Tensor:
    """KL(p ‖ q) of rows, with ratio = log p − log q."""
    usual = ratio.device.type == "cpu" and _is_usual(*ratio.aminmax())
    if not usual:  # p (log p − log q) is 0 where p is, and so must the gradient be
        ratio.masked_fill_(p == 0, -2)
    near = torch.neg(ratio, out=work).expm1_().add_(ratio).mul_(p)
    if not usual:  # e^{−r} overflows where p underflows: q itself is needed
        far = log_q.exp().sub_(p).addcmul_(p, ratio)
        near = torch.where(ratio.abs() < 1, near, far)
    return near.sum(-1)


def _is_usual(low: Tensor, high: Tensor) -> bool:
    return low.item() > _USUAL and high.item() < math.inf
