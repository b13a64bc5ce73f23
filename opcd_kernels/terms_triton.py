"""What the Triton kernels of the loss share: what one vocabulary entry adds, to the last digit."""
# mypy: disallow-untyped-defs=False

import os

import triton
import triton.language as tl

from opcd_kernels.options import KINDS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, on decoration
REVERSE_KL = tl.constexpr(KINDS.index("reverse_kl"))
FORWARD_KL = tl.constexpr(KINDS.index("forward_kl"))
JSD = tl.constexpr(KINDS.index("jsd"))
MIXTURE = tl.constexpr(KINDS.index("mixture"))
LOWEST = tl.constexpr(-1e30)  # a finite start for running maxima: −inf − −inf is not a number
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """To the nearest, ties to even, as a GPU does: for bf16 the interpreter cuts the digits."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def kl_terms(p, q, r):
    """p (e^{−r} − 1 + r) = q − p + p r, never negative; q where p is 0. r = log p − log q."""
    series = 1 / 120 - r * (1 / 720 - r * (1 / 5040 - r * (1 / 40320)))
    series = 1 / 2 - r * (1 / 6 - r * (1 / 24 - r * series))
    near = (tl.abs(r) < 0.5) & (p > 0)
    far = q - p + tl.where(p > 0, p * r, 0.0)
    return tl.where(near, p * r * r * series, far)


@triton.jit
def expm1(x):
    """e^x − 1, to the last digit also where it is small."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720))))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1)


@triton.jit
def log1p(y):
    """log(1 + y), to the last digit also where it is small."""
    s = y / (2 + y)
    s2 = s * s
    series = 2 * s * (1 + s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7))))
    return tl.where(tl.abs(y) < 0.25, series, tl.log(1 + y))


@triton.jit
def softplus(x):
    """log(1 + e^x), to the last digit also where it is small."""
    e = tl.exp(-tl.abs(x))
    series = 1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6)))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.1, e * series, tl.log(1 + e))
