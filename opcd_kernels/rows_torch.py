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
from opcd_kernels.rows import Found, Rows, mixed

_CPU_BLOCK = 2**19  # logits of one model handled at once: four buffers of 2 MiB
_BLOCK = 2**24
_BUFFERS = 4
_USUAL = -60.0  # log p − log q above which p e^{−r} is q to the last digit that counts
_NEAR = 60.0  # |log p_s − log p_t| below which both KL are summed from one exponential
_LOG_ZERO = -1e4  # stands for log p where p is 0, as exp(-1e4) is exactly: 0 · −inf is not a number


def row_width(v: int) -> int:
    """Columns of a row of logits."""
    return v


def work_bytes(tokens: int, v: int, itemsize: int) -> int:
    """Memory of `divergence_rows_` on a CPU beside the logits."""
    return _BUFFERS * min(max(1, _CPU_BLOCK // v), tokens) * v * itemsize


def divergence_rows_(
    student_logits: Tensor,  # (C, V) fp32 or fp64, without bias; its memory is used up
    teacher_logits: Tensor,  # (C, V), likewise
    student_bias: Tensor | None,  # (V,)
    teacher_bias: Tensor | None,  # (V,)
    rows: Rows,
    found: Found,  # filled; its dz may be the student's logits, or memory of its own
    options: Options,
    need_grad: bool,
) -> None:
    """Everything that happens to a block's logits."""
    c, v = student_logits.shape
    block = max(1, (_CPU_BLOCK if student_logits.device.type == "cpu" else _BLOCK) // v)
    work = student_logits.new_empty(_BUFFERS, min(block, c), v)
    in_place = found.dz.data_ptr() == student_logits.data_ptr()
    for start in range(0, c, block):
        here = slice(start, start + block)
        asked, t = rows.part(here), teacher_logits[here]
        part = found.part(here)._replace(dz=student_logits[here])
        buffers = work[:, : len(t)].unbind(0)
        slope = _finish_(part.dz, student_bias, options.student_softcap, options, buffers[3])
        if options.divergence != "none":
            _finish_(t, teacher_bias, options.teacher_softcap, options, None)
        terms = _block_(t, asked, part, buffers, options)
        if need_grad:
            _sum_(part.dz, terms, slope)
            if asked.target_ids is not None and asked.target_factors is not None:
                _subtract_(part.dz, asked.target_ids, asked.target_factors, slope)
            if not in_place:
                found.dz[here] = part.dz
    if rows.forward_shares is not None:
        found.per_token.copy_(mixed(found.reverse_kl, found.forward_kl, rows.forward_shares))
    for x in (found.per_token, found.reverse_kl, found.forward_kl):
        x.masked_fill_(rows.factors == 0, 0)
    for x in (found.entropy, found.logprobs):
        x.masked_fill_(rows.dropped, 0)


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
    # A log-softmax over a large vocabulary is off by a constant, up to 1e-3 in fp32 on a CPU: what
    # its exponentials sum to is known better than that.
    total = p_s.sum(-1)
    terms = []
    if rows.target_ids is not None:
        found.logprobs.copy_(log_s.gather(1, rows.target_ids[:, None])[:, 0]).sub_(total.log())
    if rows.target_factors is not None:
        terms.append((p_s, _shared_out(rows.target_factors, total)))
    if options.divergence == "none":
        _entropy_(found, p_s, log_s.clamp_(min=_LOG_ZERO), total, c)
        return terms
    log_t = torch.log_softmax(t, -1, out=b)
    ratio = torch.sub(log_t, log_s, out=c)
    rows = rows._replace(factors=_shared_out(rows.factors, total))
    if ratio.device.type == "cpu" and _within(*ratio.aminmax(), _NEAR):
        _entropy_(found, p_s, log_s, total, log_s)
        terms += _near_(ratio, p_s, total, rows, found, options, a, b, t)
    else:
        terms += _far_(p_s, log_s, log_t, total, rows, found, options, t, c)
    for value in (found.per_token, found.reverse_kl, found.forward_kl):
        value.div_(total)
    return terms


def _near_(
    ratio: Tensor,  # (R, V) log p_t − log p_s
    p_s: Tensor,  # (R, V)
    total: Tensor,  # (R,) its sums
    rows: Rows,
    found: Found,
    options: Options,
    *work: Tensor,  # three times (R, V)
) -> list[tuple[Tensor, Tensor]]:
    """Values and gradients where no ratio is extreme: all from e = p_t / p_s − 1.

    Gradients are centred on their means under p_s / Σ p_s: they sum to 0 also where a log-softmax
    is off by a constant.
    """
    a, b, c = work
    factors, shares = rows.factors, rows.forward_shares
    e = torch.expm1(ratio, out=b)
    terms = []
    if options.divergence in ("reverse_kl", "mixture"):
        value = torch.sub(e, ratio, out=a).mul_(p_s).sum(-1)
        gradient = torch.mul(ratio, p_s, out=a)
        _center_(gradient, p_s, total)
        (found.per_token if shares is None else found.reverse_kl).copy_(value)
        terms.append((gradient, -factors if shares is None else factors * (shares - 1)))
    if options.divergence in ("forward_kl", "mixture"):
        difference = e.mul_(p_s)
        value = torch.add(difference, p_s, out=c).mul_(ratio).sub_(difference).sum(-1)
        excess = _center_(difference, p_s, total)  # of Σ p_t, that of Σ p_s taken out
        factors = factors / (1 + excess)
        value = value / (1 + excess) + total * (excess / (1 + excess) - excess.log1p())
        (found.per_token if shares is None else found.forward_kl).copy_(value)
        terms.append((difference, -factors if shares is None else -factors * shares))
    if options.divergence == "jsd":
        # u = log m / p_s. The terms of KL(p_s ‖ m) are p_s (β e − u), of KL(p_t ‖ m)
        # p_s ((1 + e) (ratio − u) − (1 − β) e), neither of them negative.
        beta, rest = options.beta, 1 - options.beta
        excess = (torch.mul(e, p_s, out=a).sum(-1) / total)[:, None]
        e, ratio = e.sub_(excess).div_(1 + excess), ratio.sub_(excess.log1p())
        u = torch.mul(e, beta, out=a).log1p_()
        of_t = torch.sub(ratio, u, out=c)
        of_t = of_t.addcmul_(of_t, e).sub_(e, alpha=rest)
        of_s = e.mul_(beta).sub_(u)
        found.per_token.copy_(of_s.mul_(rest).add_(of_t, alpha=beta).mul_(p_s).sum(-1))
        _center_(u.mul_(p_s), p_s, total)
        terms.append((u, factors * -rest))
    return terms


def _center_(gradient: Tensor, p: Tensor, total: Tensor) -> Tensor:
    """Take the mean under p / Σ p, times p, from each entry of a row; returns the mean."""
    mean = gradient.sum(-1) / total
    gradient.addcmul_(p, mean[:, None], value=-1)
    return mean


def _far_(
    p_s: Tensor,
    log_s: Tensor,
    log_t: Tensor,
    total: Tensor,
    rows: Rows,
    found: Found,
    options: Options,
    t: Tensor,  # (R, V) of memory; so is the next
    work: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """The same for any logits, those of entries that cannot come too."""
    factors, shares = rows.factors, rows.forward_shares
    p_t = torch.exp(log_t, out=t)
    excess = p_t.sum(-1, keepdim=True) / total[:, None]
    p_t.div_(excess)
    log_t.sub_(excess.log())
    finite_s, finite_t = log_s.clamp(min=_LOG_ZERO), log_t.clamp(min=_LOG_ZERO)
    _entropy_(found, p_s, finite_s, total, work)
    terms = []
    if options.divergence in ("reverse_kl", "mixture"):
        ratio = finite_s - log_t
        value = _kl(p_s, ratio, log_t.clone(), work)
        (found.per_token if shares is None else found.reverse_kl).copy_(value)
        _center_(ratio.mul_(p_s), p_s, total)
        terms.append((ratio, factors if shares is None else factors * (1 - shares)))
    if options.divergence in ("forward_kl", "mixture"):
        value = _kl(p_t, finite_t - log_s, log_s.clone(), work)
        (found.per_token if shares is None else found.forward_kl).copy_(value)
        near = (finite_s - finite_t).abs() < 1
        difference = torch.where(near, (finite_s - finite_t).expm1().mul_(p_t), p_s - p_t)
        _center_(difference, p_s, total)
        terms.append((difference, factors if shares is None else factors * shares))
    if options.divergence == "jsd":
        # With x = log(β p_t / (1−β) p_s): log m = log (1−β) p_s + softplus(x), or with t and −x.
        beta, rest = options.beta, 1 - options.beta
        x = finite_t - finite_s + math.log(beta / rest)
        over_s, over_t = softplus(x, threshold=50), softplus(-x, threshold=50)
        log_m = finite_s + over_s + math.log(rest)
        kl_s = _kl(p_s, -math.log(rest) - over_s, log_m.clone(), work)
        kl_t = _kl(p_t, -math.log(beta) - over_t, log_m, work)
        found.per_token.copy_(beta * kl_t + rest * kl_s)
        near = (finite_t - finite_s).clamp_(max=_NEAR)
        u = torch.where(near < _NEAR, torch.log1p(beta * near.expm1()), over_s + math.log(rest))
        u = u.masked_fill_(p_s == 0, 0).mul_(p_s)
        _center_(u, p_s, total)
        terms.append((u, factors * -rest))
    return terms


def _shared_out(factors: Tensor, total: Tensor) -> Tensor:
    """factors / total; 0 where a factor is 0, whatever the logits of a token that is left out."""
    return (factors / total).masked_fill_(factors == 0, 0)


def _entropy_(found: Found, p_s: Tensor, log_s: Tensor, total: Tensor, work: Tensor) -> None:
    """Of finite logarithms."""
    mean = torch.mul(log_s, p_s, out=work).sum(-1) / total
    found.entropy.copy_(total.log() - mean)


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
