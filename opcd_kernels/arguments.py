"""What must fit together before anything is computed; every error says what to do."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_untransformed(*tensors: Any) -> None:
    """No function transform and no forward-mode derivative: the operator has rules for neither,
    and torch would take its gradient for 0."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if not isinstance(x, torch.Tensor):
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(x):
            raise RuntimeError(
                "linear_divergence must be called outside torch.func's transforms (vmap, grad, "
                "jvp, jacrev, ...), got a tensor inside one; call loss.backward() or "
                "torch.autograd.grad, and pass a batch as one tensor (B, T, D) in place of vmap"
            )
        if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "linear_divergence has no forward-mode derivative, got a dual tensor; call "
                "loss.backward() or torch.autograd.grad, whose product with a tangent is the same"
            )


def check_number(name: str, value: float) -> None:
    """A positive finite number."""
    if not isinstance(value, (Real, torch.SymInt, torch.SymFloat)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def check_count(name: str, value: int) -> None:
    """A positive integer."""
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def check_head(name: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Hidden states, weight and bias of one model."""
    for kind, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is None and kind == "bias":
            continue
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name}_{kind} must be a tensor, got {type(x).__name__}")
        if hasattr(x, "full_tensor"):
            raise ValueError(
                f"{name}_{kind} must be a plain tensor, got a DTensor; pass x.to_local()"
            )
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name}_{kind} must be floating point, in bf16, fp16, fp32 or fp64, got "
                f"{x.dtype}; dequantize it first"
            )
        if x.device != hidden.device:
            raise ValueError(
                f"{name}_hidden and {name}_{kind} must be on one device, got {hidden.device} and "
                f"{x.device}; move one of them"
            )
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name}_weight must be (V, D) with the D of {name}_hidden {tuple(hidden.shape)}, got "
            f"{tuple(weight.shape)}; pass the whole lm_head weight, untransposed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}_bias must be (V={weight.shape[0]},), got {tuple(bias.shape)}; "
            f"pass the bias of the same lm_head"
        )
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise ValueError(
            f"{name}_hidden and {name}_weight must both be fp64 or neither, got {hidden.dtype} and "
            f"{weight.dtype}; convert one of them"
        )


def check_pair(student_hidden: Tensor, teacher_hidden: Tensor) -> None:
    """Student and teacher beside each other."""
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must hold the same tokens as student_hidden "
            f"{tuple(student_hidden.shape[:-1])}, got {tuple(teacher_hidden.shape[:-1])}; pass the "
            f"hidden states of the same positions"
        )
    if teacher_hidden.device != student_hidden.device:
        raise ValueError(
            f"student and teacher must be on one device, got {student_hidden.device} and "
            f"{teacher_hidden.device}; move the teacher's hidden states and head"
        )
    if (student_hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64):
        raise ValueError(
            f"student and teacher must both be fp64 or neither, got {student_hidden.dtype} and "
            f"{teacher_hidden.dtype}; convert one of them"
        )


def checked_vocab_size(vocab_size: int | None, student_rows: int, teacher_rows: int) -> int:
    """V: `vocab_size`, or the number of rows that both heads have."""
    smaller = min(student_rows, teacher_rows)
    if smaller < 1:
        raise ValueError("student_weight and teacher_weight must have at least one row, got none")
    if vocab_size is None and student_rows != teacher_rows:
        raise ValueError(
            f"teacher_weight must have V={student_rows} rows like student_weight, got "
            f"{teacher_rows}; pass vocab_size={smaller} to use the shared rows"
        )
    if vocab_size is None:
        return student_rows
    if not _is_integer(vocab_size) or not 1 <= vocab_size <= smaller:
        raise ValueError(
            f"vocab_size must be an integer between 1 and {smaller}, the smaller head, got "
            f"{vocab_size!r}; pass the size of the tokenizer"
        )
    return vocab_size if isinstance(vocab_size, torch.SymInt) else int(vocab_size)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def checked_token_weights(token_weights: Tensor | None, student_hidden: Tensor) -> Tensor:
    """(N,) in fp32, or fp64 for fp64."""
    if token_weights is None:
        n = student_hidden.shape[:-1].numel()
        value = 1 / max(n, 1)
        return torch.full((n,), value, dtype=_wide(student_hidden), device=student_hidden.device)
    return checked_of_tokens("token_weights", token_weights, student_hidden)


def checked_of_tokens(name: str, x: Tensor, student_hidden: Tensor) -> Tensor:
    """(N,) numbers, one a token, in fp32, or fp64 for fp64."""
    _check_of_tokens(name, x, student_hidden)
    # Kernels read entry after entry: an expanded number has one alone.
    return x.detach().reshape(-1).to(_wide(student_hidden)).contiguous()


def checked_target_ids(target_ids: Tensor, student_hidden: Tensor) -> Tensor:
    """(N,) int64."""
    _check_of_tokens("target_ids", target_ids, student_hidden)
    if target_ids.dtype != torch.int64:
        raise ValueError(
            f"target_ids must be int64, got {target_ids.dtype}; pass target_ids.long()"
        )
    return target_ids.reshape(-1).contiguous()


def checked_forward_shares(
    forward_share: float | Tensor, divergence: str, student_hidden: Tensor
) -> tuple[str, Tensor | None]:
    """What is computed (`options.KINDS`), and of a mixture the shares (N,) in fp32 or fp64.

    The values of a tensor are checked where torch.compile does not trace.
    """
    is_tensor = isinstance(forward_share, torch.Tensor)
    if not is_tensor and (
        not isinstance(forward_share, (int, float)) or not 0 <= forward_share <= 1
    ):
        raise ValueError(
            f"forward_share must be a number between 0 and 1, or a tensor of them, got "
            f"{forward_share!r}"
        )
    if not is_tensor and forward_share == 0:
        return divergence, None
    if divergence != "reverse_kl":
        raise ValueError(
            f"forward_share must be 0 with divergence={divergence!r}, got {forward_share!r}; it "
            f"mixes reverse KL and forward KL: pass divergence='reverse_kl'"
        )
    if isinstance(forward_share, torch.Tensor):
        return "mixture", checked_of_tokens("forward_share", forward_share, student_hidden)
    if forward_share == 1:
        return "forward_kl", None
    n, device = student_hidden.shape[:-1].numel(), student_hidden.device
    shares = torch.full((n,), forward_share, dtype=_wide(student_hidden), device=device)
    return "mixture", shares


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_of_tokens(name: str, x: Tensor, student_hidden: Tensor) -> None:
    shape, device = student_hidden.shape[:-1], student_hidden.device
    n = shape.numel()
    if not isinstance(x, torch.Tensor) or x.is_complex():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor of real numbers, got {kind}")
    if x.shape != shape and x.shape != (n,):
        raise ValueError(
            f"{name} must hold one number for each of the {n} tokens, of shape {tuple(shape)} or "
            f"({n},), got {tuple(x.shape)}; shape it like the tokens"
        )
    if x.device not in (device, torch.device("cpu")):
        raise ValueError(
            f"{name} must be on {device} like student_hidden, or on the CPU, got {x.device}; "
            f"move it"
        )
