"""Divergence of rows of logits in plain PyTorch, a few rows at a time so that they stay in cache.

Each KL is summed from terms that are never negative, q − p + p r with r = log p − log q, taken as
p (expm1(−r) + r): the plain sum of p r loses its digits, and its sign, where student and teacher
are nearly equal.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from opcd_kernels.options import Options
from opcd_kernels.rows import Found, Rows, empty_found, mixed

_CPU_BLOCK = 2**19  # logits of one model handled at once: four buffers of 2 MiB
_BLOCK = 2**24
_BUFFERS = 4
_USUAL = -60.0  # log p − log q above which p e^{−r} is q to the last digit that counts
_NEAR = 60.0  # |log p_s − log p_t| below which both KL are summed from one exponential
_LOG_ZERO = -1e4  # stands for log p where p is 0, as exp(-1e4) is exactly: 0 · −inf is not a number


def row_width(v: int) -> int:
    """Columns of a row of logits."""
    return v


def divergence_rows_(
    student_logits: Tensor,  # (C, V) fp32 or fp64, without bias; its memory takes the gradient
    teacher_logits: Tensor,  # (C, V); its memory is used up
    student_bias: Tensor | None,  # (V,)
    teacher_bias: Tensor | None,  # (V,)
    rows: Rows,
    options: Options,
    need_grad: bool,
    compute_dtype: torch.dtype,  # the products round the gradient themselves
) -> Found:
    """Everything that happens to a chunk's logits; dz lies in the student's, unrounded."""
    c, v = student_logits.shape
    block = max(1, (_CPU_BLOCK if student_logits.device.type == "cpu" else _BLOCK) // v)
    work = student_logits.new_empty(_BUFFERS, min(block, c), v)
    found = empty_found(student_logits, rows)
    for start in range(0, c, block):
        here = slice(start, start + block)
        asked, part, t = rows.part(here), found.part(here), teacher_logits[here]
        buffers = work[:, : len(t)].unbind(0)
        slope = _finish_(part.dz, student_bias, options.student_softcap, options, buffers[3])
        if options.divergence != "none":
            _finish_(t, teacher_bias, options.teacher_softcap, options, None)
        terms = _block_(t, asked, part, buffers, options)
        if need_grad:
            _sum_(part.dz, terms, slope)
            if asked.target_ids is not None and asked.target_factors is not None:
                _subtract_(part.dz, asked.target_ids, asked.target_factors, slope)
    if rows.forward_shares is not None:
        found.per_token.copy_(mixed(found.reverse_kl, found.forward_kl, rows.forward_shares))
    for x in (found.per_token, found.reverse_kl, found.forward_kl):
        x.masked_fill_(rows.factors == 0, 0)
    for x in (found.entropy, found.logprobs):
        x.masked_fill_(rows.dropped, 0)
    return found


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
    t: Tensor, rows: Rows, found: Found, buffers: tuple[Tensor, ...], options: Options
) -> list[tuple[Tensor, Tensor]]:
    """Fill the values of R rows; the gradient as matrices (R, V), each to be multiplied with a
    factor a row (R,). One may be the student's memory, which is free otherwise."""
    a, b, c, _ = buffers
    log_s = torch.log_softmax(found.dz, -1, out=a)
    p_s = torch.exp(log_s, out=found.dz)
    terms = []
    if rows.target_ids is not None:
        found.logprobs.copy_(log_s.gather(1, rows.target_ids[:, None])[:, 0])
    if rows.target_factors is not None:
        terms.append((p_s, rows.target_factors))
    if rows.forward_shares is not None:
        log_t = torch.log_softmax(t, -1, out=b)
        return terms + _mixture_(t, p_s, log_s, log_t, rows.factors, rows.forward_shares, found, c)
    # A forward KL needs the logarithm of 0 as it is.
    finite = c if options.divergence == "forward_kl" else log_s
    _entropy_(found, p_s, torch.clamp(log_s, min=_LOG_ZERO, out=finite), c)
    if options.divergence == "none":
        return terms
    log_t = torch.log_softmax(t, -1, out=b)
    value, factors = found.per_token, rows.factors
    if options.divergence == "reverse_kl":
        ratio = log_s.sub_(log_t)
        value.copy_(_kl(p_s, ratio, log_t, c))
        terms.append((ratio.sub_(value[:, None]).mul_(p_s), factors))
    elif options.divergence == "forward_kl":
        p_t = torch.exp(log_t, out=t)
        ratio = log_t.clamp_(min=_LOG_ZERO).sub_(log_s)
        value.copy_(_kl(p_t, ratio, log_s, c))
        terms.append((torch.sub(p_s, p_t, out=t), factors))
    else:
        # With x = log(β p_t / (1−β) p_s): log m = log (1−β) p_s + softplus(x), or with t and −x.
        beta, rest = options.beta, 1 - options.beta
        p_t = torch.exp(log_t, out=t)
        x = log_t.clamp_(min=_LOG_ZERO).sub(log_s).add_(math.log(beta / rest))
        over_s, over_t = softplus(x, threshold=50), softplus(-x, threshold=50)
        log_m = log_s.add_(over_s).add_(math.log(rest))
        kl_s = _kl(p_s, -math.log(rest) - over_s, log_m, c)
        kl_t = _kl(p_t, -math.log(beta) - over_t, log_m, c)
        value.copy_(beta * kl_t + rest * kl_s)
        center = torch.mul(p_s, over_s, out=c).sum(-1, keepdim=True)
        terms.append((over_s.sub_(center).mul_(p_s).mul_(-rest), factors))
    return terms


def _entropy_(found: Found, p_s: Tensor, log_s: Tensor, work: Tensor) -> None:
    """Of finite logarithms."""
    found.entropy.copy_(torch.mul(log_s, p_s, out=work).sum(-1)).neg_()


def _mixture_(
    t: Tensor,
    p_s: Tensor,
    log_s: Tensor,
    log_t: Tensor,
    factors: Tensor,
    shares: Tensor,
    found: Found,
    work: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """Fill entropy and both KL; the gradients of both, in the memory of t, log_s and log_t."""
    of_reverse, of_forward = factors * (1 - shares), factors * shares
    ratio = torch.sub(log_t, log_s, out=t)  # log p_t − log p_s
    if ratio.device.type == "cpu" and _within(*ratio.aminmax(), _NEAR):
        _entropy_(found, p_s, log_s, work)
        # One exponential for both: with e = p_t / p_s − 1 the terms of the reverse KL are
        # p_s (e − ratio), of the forward KL p_s e ratio − p_s (e − ratio).
        e = torch.expm1(ratio, out=log_s)
        terms = torch.sub(e, ratio, out=work).mul_(p_s)
        found.reverse_kl.copy_(terms.sum(-1))
        difference = torch.mul(e, p_s, out=log_t)  # p_t − p_s
        found.forward_kl.copy_(terms.addcmul_(difference, ratio, value=-1).sum(-1)).neg_()
        gradient = ratio.add_(found.reverse_kl[:, None]).mul_(p_s)
        return [(gradient, -of_reverse), (difference, -of_forward)]
    p_t = torch.exp(log_t, out=t)
    finite_s = log_s.clamp(min=_LOG_ZERO)
    _entropy_(found, p_s, finite_s, work)
    ratio = finite_s.sub_(log_t)
    found.reverse_kl.copy_(_kl(p_s, ratio, log_t, work))
    found.forward_kl.copy_(_kl(p_t, log_t.clamp_(min=_LOG_ZERO).sub_(log_s), log_s, work))
    gradient = ratio.sub_(found.reverse_kl[:, None]).mul_(p_s)
    return [(gradient, of_reverse), (torch.sub(p_s, p_t, out=t), of_forward)]


def _sum_(out: Tensor, terms: Sequence[tuple[Tensor, Tensor]], slope: Tensor | None) -> None:
    """out (R, V) = Σ term · factor · slope, where what has no factor may be infinite."""
    for term, factor in terms:
        if slope is not None:
            term.mul_(slope)
        nothing = factor == 0
        if out.device.type != "cpu" or nothing.any():
            term.masked_fill_(nothing[:, None], 0)
    (term, factor), *others = terms
    torch.mul(term, factor[:, None], out=out)
    for term, factor in others:
        out.addcmul_(term, factor[:, None])


def _subtract_(dz: Tensor, target_ids: Tensor, factors: Tensor, slope: Tensor | None) -> None:
    """The one in factor · (p_s − onehot(target)) · slope."""
    at, factor = target_ids[:, None], factors[:, None]
    if slope is not None:
        factor = torch.where(factor == 0, 0, factor * slope.gather(1, at))
    dz.scatter_add_(1, at, -factor)


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


def _within(low: Tensor, high: Tensor, limit: float) -> bool:
    return low.item() > -limit and high.item() < limit


def _is_usual(low: Tensor, high: Tensor) -> bool:
    return low.item() > _USUAL and high.item() < math.inf
