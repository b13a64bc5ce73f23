"""Loss and gradients in chunks of tokens: the logits of one block are all that ever exists.

For each block of a chunk both models' logits are formed in buffers that all blocks share, and one
pass over their rows gives divergence, entropy and the gradient in the student's logits. That of the
whole chunk is multiplied back into the hidden states and the head at once: four products in all,
three with a frozen head, two without gradients. `sizes.py` says why there are blocks and chunks.

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
from opcd_kernels.rows import Found, Rows, empty_found
from opcd_kernels.sizes import Sizes, default_sizes, gradient_dtype, sizes_for
from opcd_kernels.tokens import counting_tokens
from opcd_kernels.tuned import Tuned

# h_s (C, D_s), h_t (C, D_t), what is asked of each row → what was found, and memory that is free
# until the next call, which overwrites both.
ChunkDivergence = Callable[[Tensor, Tensor, Rows], tuple[Found, Tensor]]


class Inputs(NamedTuple):
    """The tensors of a call."""

    student_hidden: Tensor  # (N, D_s)
    student_weight: Tensor  # (V_s, D_s)
    student_bias: Tensor | None  # (V_s,)
    teacher_hidden: Tensor  # (N, D_t)
    teacher_weight: Tensor  # (V_t, D_t)
    teacher_bias: Tensor | None  # (V_t,)
    # Of each token, on the same device or on the CPU; fp32 or fp64.
    token_weights: Tensor  # (N,)
    forward_shares: Tensor | None  # (N,) with the divergence "mixture"
    target_ids: Tensor | None  # (N,) int64
    logprob_weights: Tensor | None  # (N,) of −log p_s(target)


def is_plain(inputs: Inputs, options: Options) -> bool:
    """Whether there is nothing but hidden states, heads, token weights and a temperature.

    Not a property: torch.compile of torch 2.10 takes that of a tuple for data.
    """
    softcaps = options.student_softcap, options.teacher_softcap
    biases = inputs.student_bias, inputs.teacher_bias
    others = *softcaps, *biases, inputs.forward_shares, inputs.target_ids
    return all(x is None for x in others)


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
    tuned: Tuned = Tuned()  # to the device


class Result(NamedTuple):
    """Gradients are the loss's divided by `scale`, a power of two; what is not needed is empty."""

    loss: Tensor  # ()
    per_token: Tensor  # (N,) fp32 or fp64, like all that follow but grad_hidden
    entropy: Tensor  # (N,)
    reverse_kl: Tensor  # (N,) of a mixture, like the next
    forward_kl: Tensor  # (N,)
    logprobs: Tensor  # (N,) where there are target_ids
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
        reverse_kl=empty(0 if inputs.forward_shares is None else n),
        forward_kl=empty(0 if inputs.forward_shares is None else n),
        logprobs=empty(0 if inputs.target_ids is None else n),
        grad_hidden=empty(*(n, d) if need.hidden else (0,), dtype=student_hidden.dtype),
        grad_weight=empty(*(rows, d) if need.weight else (0,)),
        grad_bias=empty(rows if need.bias else 0),
        scale=empty(),
    )


def loss_and_gradients(
    inputs: Inputs, options: Options, work: Work, weight_grad: Tensor | None = None
) -> Result:
    """Σ token_weights · divergence − Σ logprob_weights · log p_s(target), and the gradients that
    `work.need` names, in one pass.

    With `weight_grad` (V_s, D_s) the head's gradient is added to that instead, unscaled.
    """
    need, v, device = work.need, options.vocab_size, inputs.student_hidden.device
    adds = weight_grad is not None
    result = empty_result(inputs, need._replace(weight=need.weight and not adds))
    if len(inputs.student_hidden) == 0:
        return Result(*(x.zero_() for x in result))
    tokens = counting_tokens(
        inputs.token_weights,
        inputs.forward_shares,
        inputs.target_ids,
        inputs.logprob_weights,
        v,
        device,
    )
    if tokens.no_divergence:
        options = options._replace(divergence="none")
    products = products_for(device, work.compute_dtype)
    w_s = products.head(inputs.student_weight[:v])
    shared = tokens.no_divergence or _is_same(inputs.student_weight, inputs.teacher_weight)
    w_t = w_s if shared else products.head(inputs.teacher_weight[:v])
    biases = inputs.student_bias, inputs.teacher_bias
    b_s, b_t = (None if b is None else b[:v].contiguous() for b in biases)
    values = result[1 : Result._fields.index("grad_hidden")]
    if tokens.kept is not None or tokens.no_divergence:
        for x in (*values, result.grad_hidden):
            x.zero_()

    n = len(tokens.weights)
    scale = result.scale.fill_(1) if adds else result.scale.copy_(tokens.scale())
    target_weights = tokens.logprob_weights
    rows = Rows(
        tokens.weights / scale / options.temperature,
        None if tokens.no_divergence else tokens.forward_shares,
        tokens.target_ids,
        None if target_weights is None else target_weights / scale / options.temperature,
    )
    result.grad_bias.zero_()
    result.grad_weight[v if n else 0 :].zero_()  # the first chunk stores into the rows before
    grad_weight = result.grad_weight if weight_grad is None else weight_grad

    limit = default_sizes(device, v, work.compute_dtype, work.backend, work.tuned.block)
    sizes = sizes_for(n, limit, work.chunk_tokens)
    divergence = chunk_divergence(products, (w_s, w_t), (b_s, b_t), sizes, options, work)
    for start in range(0, n, sizes.chunk):
        part = slice(start, start + sizes.chunk)
        here = part if tokens.kept is None else tokens.kept[part]
        h_s, h_t = inputs.student_hidden[here], inputs.teacher_hidden[here]
        asked = rows.part(part)
        found, scratch = divergence(h_s, h_t, asked)
        result.per_token[here], result.entropy[here] = found.per_token, found.entropy
        if asked.forward_shares is not None:
            result.reverse_kl[here], result.forward_kl[here] = found.reverse_kl, found.forward_kl
        if asked.target_ids is not None:
            result.logprobs[here] = found.logprobs
        if need.bias:
            result.grad_bias[:v] += found.dz.sum(0, dtype=result.grad_bias.dtype)
        if need.hidden:
            result.grad_hidden[here] = products.grad_hidden(
                found.dz, w_s, result.grad_hidden.dtype, scratch
            )
        if need.weight:
            # A dropped token must not even multiply 0 with infinity.
            h_s = h_s.masked_fill(asked.dropped[:, None], 0)
            products.grad_weight_(grad_weight[:v], found.dz, h_s, adds or start > 0)
    result.loss.copy_(tokens.loss(result.per_token, result.logprobs))
    return result


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether both are one matrix in memory: a head that student and teacher share."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (
        *(b.data_ptr(), b.shape, b.stride(), b.dtype),
    )


def chunk_divergence(
    products: Products,
    heads: tuple[Tensor, Tensor],  # (V, D_s), (V, D_t)
    biases: tuple[Tensor | None, Tensor | None],  # (V,) each
    sizes: Sizes,
    options: Options,
    work: Work,
) -> ChunkDivergence:
    """What turns hidden states into divergences and the gradient in the logits."""
    if work.backend == "triton_dual":  # Triton has no build for some platforms
        return _without_logits(heads, sizes, options, work)
    if work.backend == "triton":
        from opcd_kernels.rows_triton import divergence_rows_, row_width
    else:
        from opcd_kernels.rows_torch import divergence_rows_, row_width
    v, need_grad = options.vocab_size, any(work.need)
    wide = torch.promote_types(products.dtype, torch.float32)
    dtype = gradient_dtype(work.backend, heads[0].device, products.dtype)

    def rows_of(tokens: int, dtype: torch.dtype) -> Tensor:
        return heads[0].new_empty(tokens, row_width(v), dtype=dtype)

    over = need_grad and dtype == wide  # the gradient over the student's logits
    dz = rows_of(sizes.chunk if need_grad else 0, dtype)
    z_s, z_t = dz if over else rows_of(sizes.block, wide), rows_of(sizes.block, wide)
    for logits in (z_s, z_t):
        logits[:, v:] = -torch.inf

    def divergence(h_s: Tensor, h_t: Tensor, rows: Rows) -> tuple[Found, Tensor]:
        found = empty_found(dz[: len(h_s), :v], rows)
        for start in range(0, len(h_s), sizes.block):
            block = slice(start, start + sizes.block)
            part = found.part(block)
            teacher = z_t[: len(h_s[block]), :v]
            student = part.dz if over else z_s[: len(teacher), :v]
            products.logits_(student, h_s[block], heads[0])
            if options.divergence != "none":
                products.logits_(teacher, h_t[block], heads[1])
            divergence_rows_(student, teacher, *biases, rows.part(block), part, options, need_grad)
        return found, z_t

    return divergence


def _without_logits(
    heads: tuple[Tensor, Tensor], sizes: Sizes, options: Options, work: Work
) -> ChunkDivergence:
    """One kernel for both products, a chunk at a time."""
    from opcd_kernels.dual_triton import DualProduct, Tile

    tile = Tile(*work.tuned.tile)
    dual = DualProduct(*heads, sizes.chunk, options, any(work.need), tile)

    def divergence(h_s: Tensor, h_t: Tensor, rows: Rows) -> tuple[Found, Tensor]:
        per_token, entropy, dz, scratch = dual(h_s, h_t, rows.factors)
        found = empty_found(dz, rows)._replace(per_token=per_token, entropy=entropy)
        return found, scratch

    return divergence
