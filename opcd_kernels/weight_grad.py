"""A head's gradient added to `.grad` before backward: when that is right, and when it is refused.

Whoever acts on gradients as autograd delivers them (hooks, DDP, FSDP, a loss scaler, activation
checkpointing) would see too little or too late, so each is refused where it can be seen: before
anything is added, or in backward. Hooks on the node that accumulates a gradient cannot be seen.
"""

from typing import NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_INSTEAD = "pass add_weight_grad=False"


def check_weight_grad(weight: Tensor, compute_dtype: torch.dtype) -> None:
    """Raise ValueError where adding to `weight.grad` would be wrong."""

    def refuse(must: str, got: str, do: str = _INSTEAD) -> NoReturn:
        raise ValueError(f"with add_weight_grad {must}, got {got}; {do}")

    if torch.compiler.is_compiling():
        refuse("the call must not be compiled", "a call that torch.compile traces")
    if hasattr(weight, "full_tensor"):
        refuse("student_weight must be a plain parameter", "a DTensor")
    if not (weight.is_leaf and weight.requires_grad):
        refuse(
            "student_weight must be a parameter, a leaf that requires a gradient",
            "one without a gradient" if weight.is_leaf else "the result of an operation",
            f"pass lm_head.weight itself, or {_INSTEAD[5:]}",
        )
    if weight.dtype != torch.float32:
        refuse("student_weight must be in fp32", str(weight.dtype))
    grad = weight.grad
    if grad is not None and (grad.layout, grad.dtype) != (torch.strided, torch.float32):
        refuse("student_weight.grad must be dense and in fp32", f"{grad.layout}, {grad.dtype}")
    if compute_dtype == torch.float16:
        refuse(
            "the products must not be in fp16, whose gradients need a scale",
            "fp16",
            f"use bf16, or {_INSTEAD}",
        )
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        refuse("student_weight must have no hooks, which would not see the gradient", "hooks")
    if DistributedDataParallel._get_active_ddp_module() is not None:
        refuse("there must be no DistributedDataParallel, which would wait", "a call inside one")
    processes = _processes()
    if processes > 1:
        refuse("there must be one process, as nobody averages the gradient", f"{processes}")
    if torch._C._current_graph_task_id() != -1:
        refuse(
            "the call must not be repeated",
            "one inside a backward pass",
            f"leave it out of activation checkpointing, or {_INSTEAD}",
        )


def _processes() -> int:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def grad_of(weight: Tensor) -> Tensor:
    """`weight.grad`, which starts from zero."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def check_unscaled(grad_loss: Tensor, weight: Tensor, added_to: Tensor | None) -> None:
    """Raise RuntimeError in a backward that does not fit what forward added to `weight.grad`."""
    if added_to is None:
        raise RuntimeError(
            "with add_weight_grad the loss must have one backward, got a second; " + _INSTEAD
        )
    if weight.grad is not added_to:
        raise RuntimeError(
            "with add_weight_grad student_weight.grad must stay what it was in the forward pass, "
            "got another in backward; call zero_grad before the forward pass"
        )
    # On a GPU an assertion on the device: nothing waits.
    torch._assert_async(
        grad_loss == 1,
        "with add_weight_grad the loss must be unscaled (its gradient 1), got another gradient in "
        "backward; put the scale into token_weights, or " + _INSTEAD,
    )
