"""Loss and gradients in chunks of tokens: the logits of one chunk are all that ever exists.

For each chunk both models' logits are formed in buffers that all chunks share, one pass over their
rows gives divergence, entropy and the gradient in the student's logits, and that gradient is
multiplied back into the hidden states and the head at once: four products in all, three with a
frozen head, two without gradients.

The way from hidden states to the gradient in the logits has two forms: logits in fp32 from library
products (`rows_torch.py`, `rows_triton.py`), or one kernel that keeps the logits on the chip
(`dual_triton.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from opcd_kernels.options import Options
from opcd_kernels.products import Products, products_for

_CPU_BUFFER_BYTES = 128 * 2**20
_GPU_BUFFER_SHARE = 0.03  # of the device's memory

# h_s (C, D_s), h_t (C, D_t), factors (C,) → per_token (C,), entropy (C,), the gradient in the
# logits (C, V), and scratch of that size; the next call overwrites the last two.
ChunkDivergence = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class Inputs(NamedTuple):
    """The tensors of a call."""

    student_hidden: Tensor  # (N, D_s)
    student_weight: Tensor  # (V_s, D_s)
    student_bias: Tensor | None  # (V_s,)
    teacher_hidden: Tensor  # (N, D_t)
    teacher_weight: Tensor  # (V_t, D_t)
    teacher_bias: Tensor | None  # (V_t,)
    token_weights: Tensor  # (N,) fp32 or fp64, on the same device or on the CPU


class Gradients(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool


class Work(NamedTuple):
    """How a call is computed."""

    chunk_tokens: int | None
    compute_dtype: torch.dtype  # the operands of the products are rounded to it
    backend: str  # "torch", "triton" or "triton_dual"
    need: Gradients


class Result(NamedTuple):
    """Gradients are the loss's divided by `scale`, a power of two; empty where not needed."""

    loss: Tensor  # ()
    per_token: Tensor  # (N,) fp32 or fp64, like all that follow but grad_hidden
    entropy: Tensor  # (N,)
    grad_hidden: Tensor  # (N, D_s) in the dtype of student_hidden
    grad_weight: Tensor  # (V_s, D_s)
    grad_bias: Tensor  # (V_s,)
    scale: Tensor  # ()


def empty_result(inputs: Inputs, need: Gradients) -> Result:
    """A result's tensors, uninitialised."""
    student_hidden = inputs.student_hidden
    wide = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    # Sizes may be symbolic here: len() would make torch.compile specialise on them.
    n, (rows, d) = student_hidden.shape[0], inputs.student_weight.shape

    def empty(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return student_hidden.new_empty(shape, dtype=dtype)

    return Result(
        loss=empty(),
        per_token=empty(n),
        entropy=empty(n),
        grad_hidden=empty(*(n, d) if need.hidden else (0,), dtype=student_hidden.dtype),
        grad_weight=empty(*(rows, d) if need.weight else (0,)),
        grad_bias=empty(rows if need.bias else 0),
        scale=empty(),
    )


def loss_and_gradients(
    inputs: Inputs, options: Options, work: Work, weight_grad: Tensor | None = None
) -> Result:
    """Σ token_weights · divergence, and the gradients that `work.need` names, in one pass.

    With `weight_grad` (V_s, D_s) the head's gradient is added to that instead, unscaled.
    """
    need, v, device = work.need, options.vocab_size, inputs.student_hidden.device
    adds = weight_grad is not None
    result = empty_result(inputs, need._replace(weight=need.weight and not adds))
    if len(inputs.student_hidden) == 0:
        return Result(*(x.zero_() for x in result))
    products = products_for(device, work.compute_dtype)
    w_s = products.head(inputs.student_weight[:v])
    shared = _is_same(inputs.student_weight, inputs.teacher_weight)
    w_t = w_s if shared else products.head(inputs.teacher_weight[:v])
    biases = inputs.student_bias, inputs.teacher_bias
    b_s, b_t = (None if b is None else b[:v].contiguous() for b in biases)
    kept, weights = _kept_tokens(inputs.token_weights, device)
    if kept is not None:
        for x in (result.per_token, result.entropy, result.grad_hidden):
            x.zero_()

    n = len(weights)
    scale = result.scale.fill_(1) if adds else result.scale.copy_(_scale(weights))
    factors = weights / scale / options.temperature
    result.grad_bias.zero_()
    result.grad_weight[v if n else 0 :].zero_()  # the first chunk stores into the rows before
    grad_weight = result.grad_weight if weight_grad is None else weight_grad

    chunk = _equal_chunks(n, work.chunk_tokens or default_chunk_tokens(device, v))
    divergence = chunk_divergence(
        products, (w_s, w_t), (b_s, b_t), min(chunk, n), options, any(need), work.backend
    )
    for start in range(0, n, chunk):
        part = slice(start, start + chunk)
        tokens = part if kept is None else kept[part]
        h_s, h_t = inputs.student_hidden[tokens], inputs.teacher_hidden[tokens]
        value, entropy, dz, scratch = divergence(h_s, h_t, factors[part])
        result.per_token[tokens], result.entropy[tokens] = value, entropy
        if need.bias:
            result.grad_bias[:v] += dz.sum(0, dtype=result.grad_bias.dtype)
        if need.hidden:
            result.grad_hidden[tokens] = products.grad_hidden(
                dz, w_s, result.grad_hidden.dtype, scratch
            )
        if need.weight:
            # A dropped token must not even multiply 0 with infinity.
            h_s = h_s.masked_fill((factors[part] == 0)[:, None], 0)
            products.grad_weight_(grad_weight[:v], dz, h_s, adds or start > 0, scratch)
    result.loss.copy_(
        (weights * (result.per_token if kept is None else result.per_token[kept])).sum()
    )
    return result


def _scale(weights: Tensor) -> Tensor:
    """The power of two above the largest weight: relative to it 1/N does not underflow in fp16."""
    largest = weights.abs().max() if len(weights) else weights.new_zeros(())
    return torch.exp2(torch.frexp(largest).exponent.clamp(max=127).to(largest.dtype))


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are one matrix in memory: a head that student and teacher share."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (
        *(b.data_ptr(), b.shape, b.stride(), b.dtype),
    )


def chunk_divergence(
    products: Products,
    heads: tuple[Tensor, Tensor],  # (V, D_s), (V, D_t)
    biases: tuple[Tensor | None, Tensor | None],  # (V,) each
    tokens: int,  # of the largest chunk
    options: Options,
    need_grad: bool,
    backend: str,
) -> ChunkDivergence:
    """What turns hidden states into divergences and the gradient in the logits."""
    if backend == "triton_dual":  # Triton has no build for some platforms: imported where needed
        from opcd_kernels.dual_triton import DualProduct

        return DualProduct(*heads, tokens, options, need_grad)
    if backend == "triton":
        from opcd_kernels.rows_triton import divergence_rows_, row_width
    else:
        from opcd_kernels.rows_torch import divergence_rows_, row_width
    v = options.vocab_size
    wide = torch.promote_types(products.dtype, torch.float32)
    buffers = heads[0].new_empty(2, tokens, row_width(v), dtype=wide)
    buffers[:, :, v:] = -torch.inf

    def divergence(h_s: Tensor, h_t: Tensor, factors: Tensor) -> tuple[Tensor, ...]:
        z_s, z_t = buffers[:, : len(h_s), :v].unbind(0)
        products.logits_(z_s, h_s, heads[0])
        products.logits_(z_t, h_t, heads[1])
        found = divergence_rows_(z_s, z_t, *biases, factors, options, need_grad, products.dtype)
        return *found, z_t

    return divergence


def default_chunk_tokens(device: torch.device, vocab_size: int) -> int:
    """Tokens whose logits of both models fit the buffers' share of memory, a multiple of 128."""
    if device.type == "cuda":
        budget = _GPU_BUFFER_SHARE * torch.cuda.get_device_properties(device).total_memory
    else:
        budget = _CPU_BUFFER_BYTES
    tokens = int(budget / (2 * 4 * vocab_size))
    return tokens // 128 * 128 if tokens >= 128 else max(1, tokens)


def _equal_chunks(n: int, limit: int) -> int:
    """Tokens a chunk: as few chunks as `limit` allows, all of one size, of 128 if that fits."""
    size = -(-n // max(1, -(-n // limit)))
    rounded = -(-size // 128) * 128
    return max(1, rounded if rounded <= limit else size)


def _kept_tokens(token_weights: Tensor, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Indices of the tokens whose weight is not 0 (None: all), and the weights, on `device`.

    Leaving tokens out needs their number. Weights that live on a GPU are not waited for: all tokens
    are kept and the rows of weight 0 are skipped when their turn comes.
    """
    if token_weights.device.type != "cpu":
        return None, token_weights
    kept = token_weights.nonzero()[:, 0]
    if len(kept) == len(token_weights):
        return None, _moved(token_weights, device)
    return _moved(kept, device), _moved(token_weights[kept], device)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, without waiting for the queue of a GPU."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)
