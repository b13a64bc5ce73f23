"""The loss as autograd and torch.compile see it: one operation, whose forward has the gradients.

Because the token weights are an input, nothing is left for backward but to scale what the forward
pass formed. A custom operator does that for everyone; `AddingWeightGrad` is for a head whose
gradient has been added to its `.grad` by then (`weight_grad.py`), which an operator with a
gradient must not do.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from opcd_kernels.backends import and_slower, chosen_backend
from opcd_kernels.chunks import (
    Gradients,
    Inputs,
    Result,
    Work,
    empty_result,
    is_plain,
    loss_and_gradients,
)
from opcd_kernels.options import Options
from opcd_kernels.trial import agrees
from opcd_kernels.tuned import tuned_to
from opcd_kernels.weight_grad import check_unscaled, grad_of

_SCALED_BYTES = 8 * 2**20  # of a gradient scaled at once


@torch.library.custom_op("opcd_kernels::linear_divergence", mutates_args=())
def operator(
    # Inputs
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    token_weights: Tensor,
    forward_shares: Tensor | None,
    target_ids: Tensor | None,
    logprob_weights: Tensor | None,
    # Options
    divergence: str,
    beta: float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    vocab_size: int,
    # Work
    chunk_tokens: int | None,
    compute_dtype: torch.dtype,
    backend: str,
    need: list[bool],
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    """A `Result`, differentiable in the student's tensors."""
    return _solved(
        Inputs(
            student_hidden,
            student_weight,
            student_bias,
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            token_weights,
            forward_shares,
            target_ids,
            logprob_weights,
        ),
        Options(divergence, beta, temperature, student_softcap, teacher_softcap, vocab_size),
        Work(chunk_tokens, compute_dtype, backend, Gradients(*need)),
    )


def _solved(
    inputs: Inputs, options: Options, work: Work, weight_grad: Tensor | None = None
) -> Result:
    device = inputs.student_hidden.device
    shape = options.vocab_size, inputs.student_hidden.shape[1]
    head = "trained" if work.need.weight else "frozen"
    if work.backend != "torch":
        work = work._replace(tuned=tuned_to(device, shape, head))
    with torch.autocast(device.type, enabled=False):
        if work.backend == "auto":  # here, where torch.compile does not trace
            work = work._replace(backend=_auto(inputs, options, work))
        return loss_and_gradients(inputs, options, work, weight_grad)


def _auto(inputs: Inputs, options: Options, work: Work) -> str:
    shape = options.vocab_size, inputs.student_hidden.shape[1]
    head = "trained" if work.need.weight else "frozen"
    plain = is_plain(inputs, options)
    device = inputs.student_hidden.device
    chosen = chosen_backend(device, work.compute_dtype, plain, shape, head)
    return next(x for x in and_slower(chosen) if agrees(x, inputs, options, work))


@operator.register_fake
def _(*arguments: Any) -> Result:
    return empty_result(Inputs(*arguments[: len(Inputs._fields)]), Gradients(*arguments[-1]))


@register_flop_formula(torch.ops.opcd_kernels.linear_divergence)
def _flops(*shapes: Any, out_shape: Any = None) -> int:
    """Of the products, whatever tokens are dropped; for `torch.utils.flop_counter`.

    2 N V D a product: the student's logits and its two gradients as needed, the teacher's logits.
    """
    inputs = Inputs(*shapes[: len(Inputs._fields)])
    options = Options(*shapes[len(inputs) : len(inputs) + len(Options._fields)])
    need = Gradients(*shapes[-1])
    n, d_s = inputs.student_hidden
    products = d_s * (1 + need.hidden + need.weight)
    products += inputs.teacher_hidden[1] if options.divergence != "none" else 0
    return int(2 * n * options.vocab_size * products)


def _save_gradients(ctx: Any, inputs: tuple, output: tuple) -> None:
    result = Result(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*result[1:])
    ctx.save_for_backward(result.grad_hidden, result.grad_weight, result.grad_bias, result.scale)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.need = inputs[-1]


def _scale_gradients(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple:
    others = (None,) * (len(ctx.needs_input_grad) - 3)
    return (*_scaled_gradients(ctx, grad_loss), *others)


def _scaled_gradients(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of student_hidden, student_weight and student_bias."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_divergence has no second derivative: its gradient is formed in the forward "
            "pass; call backward or autograd.grad without create_graph"
        )
    *grads, scale = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 3
    return tuple(
        _scaled(grad, grad_loss * scale, dtype) if needed else None
        for grad, dtype, needed in zip(grads, ctx.dtypes, ctx.need, strict=True)
    )


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """grad · factor in the factor's precision, rounded to `dtype` once, a part at a time."""
    if grad.dtype == dtype == factor.dtype:
        return grad * factor
    if type(grad) is not Tensor:  # traced: a compiler keeps no intermediate, and parts are unrolled
        return (grad.to(factor.dtype) * factor).to(dtype)
    out = torch.empty_like(grad, dtype=dtype)
    rows = max(1, _SCALED_BYTES // (factor.dtype.itemsize * max(1, grad[:1].numel())))
    for part, source in zip(out.split(rows), grad.split(rows), strict=True):
        part.copy_(source.to(factor.dtype) * factor)
    return out


operator.register_autograd(_scale_gradients, setup_context=_save_gradients)


class AddingWeightGrad(torch.autograd.Function):
    """The operator with the head's gradient in `student_weight.grad` when forward returns."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # these three are the first of `inputs`, for autograd to see
        student_weight: Tensor,
        student_bias: Tensor | None,
        inputs: Inputs,
        options: Options,
        work: Work,
    ) -> Result:
        ctx.weight, ctx.weight_grad = student_weight, grad_of(student_weight)
        result = _solved(inputs, options, work, ctx.weight_grad)
        _save_gradients(ctx, (*inputs[:3], work.need._replace(weight=False)), result)
        return result

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple:
        check_unscaled(grad_loss, ctx.weight, ctx.weight_grad)
        ctx.weight_grad = None  # a second backward would have to add it again
        return (*_scaled_gradients(ctx, grad_loss), None, None, None)
