"""Which attention computes a layer: the fastest that can, tried once on the device.

A kernel that is there may still not run (a wheel for another torch or another GPU, a width that
it refuses), and none of those for CUDA has been seen on every GPU. So before one is used it
computes a small problem of the same kind, and its gradients where they are asked for, beside plain
PyTorch: an error or a difference takes the next one, and says so once.
"""

import functools
import importlib.util
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.passes.attention import Operands, Shape, prefix_attention
from opcd.passes.flash import KERNELS
from opcd.passes.packing import Packing
from opcd_kernels.trial import capturing, error, waiting_is_allowed

log = logging.getLogger(__name__)

WIDEST = 256  # heads of the kernels for CUDA
TRIAL = ((9, 5, 1), (1,), (8,))  # lengths of sequences, in groups; behind prefixes of
TRIAL_PREFIXES = (7, 40, 0)  # so many tokens
# Relative, in the 2-norm, beside plain attention of the same 16-bit numbers in fp32.
BOUND = {torch.float16: 0.01, torch.bfloat16: 0.03}


_FOUND: dict[tuple[str, "Kind"], bool] = {}  # what was tried in this process


class Kind(NamedTuple):
    """What a backend must be able to do."""

    device: torch.device
    dtype: torch.dtype
    width: int  # of query and key
    value_width: int
    group: int  # heads that share a key
    window: bool
    softcap: bool
    sinks: bool
    grad: bool

    @classmethod
    def of(cls, operands: Operands, shape: Shape) -> "Kind":
        """Of the attention of one layer."""
        query, key, value = operands[:3]
        return cls(
            *(query.device, query.dtype, query.shape[-1], value.shape[-1]),
            query.shape[1] // key.shape[1],
            *(shape.window is not None, shape.softcap is not None, shape.sinks is not None),
            operands.requires_grad,
        )


def choose_backend(kind: Kind) -> str:
    """The fastest of what computes this: a name for `Plan.backend`."""
    names = candidates(kind)
    if kind.device.type == "cpu":
        return names[0]
    if capturing(kind.device):  # nothing can be tried: what is known counts
        return next(name for name in names if _FOUND.get((name, kind), True))
    return next(name for name in names if name == "plain" or works(name, kind))


def candidates(kind: Kind) -> tuple[str, ...]:
    """What could compute it, the fastest first, before anything is tried."""
    dense = not kind.window and not kind.softcap
    # The gradient of a sink goes through the log-sum-exp, which fused kernels do not return.
    if kind.value_width != kind.width or (kind.grad and kind.sinks):
        return ("plain",)
    if kind.device.type == "cpu":
        return ("aten flash, cpu", "plain") if dense else ("plain",)
    if kind.device.type != "cuda" or kind.dtype not in BOUND or kind.width > WIDEST:
        return ("plain",)
    found = []
    if dense:
        found = [
            name
            for name, kernel in KERNELS.items()
            if name != "aten flash, cpu" and (kernel.has_backward or not kind.grad)
        ]
    elif not kind.grad:
        found = ["triton"]
    package = {"flash-attn package": "flash_attn", "triton": "triton"}
    return (*(x for x in found if x not in package or _is_there(package[x])), "plain")


@functools.cache
def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def works(name: str, kind: Kind) -> bool:
    """Whether a backend computes a small problem of this kind as plain attention does.

    It is tried once; where it does not, that is said.
    """
    if (name, kind) not in _FOUND:
        _FOUND[name, kind] = _works(name, kind)
    return _FOUND[name, kind]


def _works(name: str, kind: Kind) -> bool:
    try:
        with (
            waiting_is_allowed(kind.device),
            torch.autocast(kind.device.type, enabled=False),
            torch.inference_mode(False),
            torch.set_grad_enabled(kind.grad),
        ):
            expected, found = _tried("plain", kind), _tried(name, kind)
    except torch.OutOfMemoryError:
        raise
    except Exception as refused:  # an import, a launch, a compiler: whatever a kernel can meet
        reason = " ".join(f"{type(refused).__name__}: {refused}".split())[:200]
    else:
        errors = [error(a, b) for a, b in zip(found, expected, strict=True)]
        if all(e <= BOUND.get(kind.dtype, 1e-4) for e in errors):  # nan is not
            return True
        what = "output and gradients" if kind.grad else "output"
        numbers = ", ".join(f"{e:.2g}" for e in errors)
        reason = (
            f"on {sum(map(sum, TRIAL))} tokens {what} differ from plain attention's by {numbers}"
        )
    log.warning("attention does not use %s on %s: %s", name, kind.device, reason)
    return False


def _tried(name: str, kind: Kind) -> list[Tensor]:
    """Output and gradients of a small problem; plain attention computes it in fp32."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if name == "plain" else kind.dtype

    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=generator).to(kind.dtype)
        return x.to(kind.device, dtype).requires_grad_(kind.grad)

    n, kv_heads = sum(map(sum, TRIAL)), 2
    heads = kv_heads * kind.group
    query, key, value = (
        normal(n, h, w)
        for h, w in ((heads, kind.width), (kv_heads, kind.width), (kv_heads, kind.value_width))
    )
    keys = tuple(normal(kv_heads, s, kind.width) for s in TRIAL_PREFIXES)
    values = tuple(normal(kv_heads, s, kind.value_width) for s in TRIAL_PREFIXES)
    shape = Shape(
        kind.width**-0.5,
        6 if kind.window else None,
        2.0 if kind.softcap else None,
        normal(heads).detach() if kind.sinks else None,
    )
    packing = Packing(TRIAL, kind.device)
    out = prefix_attention(Operands(query, key, value, keys, values), packing, shape, name)
    if not kind.grad:
        return [out]
    leaves = [x for x in (query, key, value, *keys, *values) if x.numel()]
    weight = torch.randn(out.shape, generator=generator).to(kind.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]
