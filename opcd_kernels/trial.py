"""Whether a backend agrees with PyTorch on the device at hand, found out on its first use.

No kernel has run on every GPU, and a run must not end, or learn nonsense, for the sake of a faster
way. So what "auto" would take computes 64 tokens first: loss, divergences and gradients are held
against the torch backend's. A launch that fails, a kernel that asks for more than the device has, a
difference: the next backend is tried, and a warning says so once, with the numbers. It is done once
for a device, dtypes and options, on heads of some ten thousand rows, and never on a CPU.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from opcd_kernels.chunks import Gradients, Inputs, Result, Work, loss_and_gradients
from opcd_kernels.options import Options

log = logging.getLogger(__name__)

TOKENS = 64  # in two chunks: the second one's gradient is added to the first's
# Of the vocabulary at most: programs that take tiles in turn take more than two each. The remainder
# by 16 is that of the call.
ENTRIES = 40_960
WIDTH = 256  # hidden units at most; likewise
NOISE = 0.1  # how far the teacher's hidden states are from the student's
# Relative, in the 2-norm. A 16-bit gradient has 0.2 % of its own, the dual product's values 0.5 %.
BOUND_16_BIT, BOUND = 0.01, 1e-3

_FOUND: dict[tuple[object, ...], bool] = {}


def agrees(backend: str, inputs: Inputs, options: Options, work: Work) -> bool:
    """Whether `backend` computes 64 tokens of such a call as the torch backend does."""
    device = inputs.student_hidden.device
    if backend == "torch":
        return True
    key = _key(backend, inputs, options, work)
    if capturing(device):  # nothing can be tried: what is known counts
        return _FOUND.get(key, True)
    if key not in _FOUND:
        reason = why_not(backend, inputs, options, work)
        if reason is not None:
            log.warning("the loss does not use %s on %s: %s", backend, device, reason)
        _FOUND[key] = reason is None
    return _FOUND[key]


@torch.no_grad()
def why_not(backend: str, inputs: Inputs, options: Options, work: Work) -> str | None:
    """How a backend fails on 64 tokens of such a call, or None."""
    options = options._replace(vocab_size=_fewer(options.vocab_size, ENTRIES))
    device = inputs.student_hidden.device
    with waiting_is_allowed(device):
        few, work = _few(inputs, options), work._replace(chunk_tokens=TOKENS // 2)
        # Not tried but needed: whoever fails here would fail in its place.
        expected = loss_and_gradients(few, options, work._replace(backend="torch"))
        try:
            found = loss_and_gradients(few, options, work._replace(backend=backend))
            errors = _errors(found, expected, work.need)
        except torch.OutOfMemoryError:
            raise
        except Exception as refused:  # of a compiler, a launch, a driver: none of them ends a run
            return " ".join(f"{type(refused).__name__}: {refused}".split())[:200]
    bound = BOUND_16_BIT if work.compute_dtype.itemsize == 2 else BOUND
    if all(e <= bound for e in errors.values()):  # nan is not
        return None
    numbers = ", ".join(f"{name} by {e:.2g}" for name, e in errors.items())
    return f"on {TOKENS} tokens it differs from torch ({numbers}; {bound:g} is allowed)"


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-30)).item()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, in which nothing can be compared."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def waiting_is_allowed(device: torch.device) -> Iterator[None]:
    """A comparison waits for the GPU, also where a caller has torch complain of that."""
    before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if before == 0:
        yield
        return
    set_sync_debug_mode(0)
    try:
        yield
    finally:
        set_sync_debug_mode(before)


def set_sync_debug_mode(mode: int | str) -> None:
    """torch's own, without its warning that this is a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


def _key(backend: str, inputs: Inputs, options: Options, work: Work) -> tuple[object, ...]:
    """What a kernel is compiled for."""
    tensors = tuple(None if x is None else x.dtype for x in inputs)
    device, v = inputs.student_hidden.device, options.vocab_size
    kinds = options.divergence, options.student_softcap is None, options.teacher_softcap is None
    widths = inputs.student_hidden.shape[1] % 16, inputs.teacher_hidden.shape[1] % 16
    one_head = inputs.student_weight.data_ptr() == inputs.teacher_weight.data_ptr()
    return (
        *(backend, device, work.compute_dtype, work.need, work.tuned),
        *(tensors, kinds, v % 16, v > ENTRIES, widths, one_head),
    )


def _fewer(size: int, limit: int) -> int:
    """At most about `limit`, with the size's own remainder by 16."""
    return size if size <= limit else limit + size % 16


def _few(inputs: Inputs, options: Options) -> Inputs:
    """64 tokens of two models that nearly agree, in the dtypes of a call and with all it has."""
    generator = torch.Generator().manual_seed(0)
    v, device = options.vocab_size, inputs.student_hidden.device
    d_s, d_t = (_fewer(x.shape[1], WIDTH) for x in (inputs.student_hidden, inputs.teacher_hidden))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    h, w = normal(TOKENS, max(d_s, d_t)), 2.4 / max(d_s, d_t) ** 0.5 * normal(v, max(d_s, d_t))
    made = {
        "student_hidden": h[:, :d_s],
        "student_weight": w[:, :d_s],
        "student_bias": normal(v),
        "teacher_hidden": h[:, :d_t] + NOISE * normal(TOKENS, d_t),
        "teacher_weight": w[:, :d_t],
        "teacher_bias": normal(v),
        "token_weights": torch.rand(TOKENS, generator=generator) / TOKENS,
        "forward_shares": torch.rand(TOKENS, generator=generator),
        "target_ids": torch.randint(v, (TOKENS,), generator=generator),
        "logprob_weights": normal(TOKENS) / TOKENS,
    }
    given = inputs._asdict()
    few = {
        name: None if given[name] is None else x.to(device, given[name].dtype).contiguous()
        for name, x in made.items()
    }
    if inputs.student_weight.data_ptr() == inputs.teacher_weight.data_ptr() and d_s == d_t:
        few["teacher_weight"] = few["student_weight"]
    return Inputs(**few)  # type: ignore[arg-type]


def _errors(found: Result, expected: Result, need: Gradients) -> dict[str, float]:
    """Of what a call asks for; gradients as the loss's, whatever power of two they are kept in."""
    pairs = {
        "loss": (found.loss, expected.loss),
        "divergences": (found.per_token, expected.per_token),
        "entropies": (found.entropy, expected.entropy),
    }
    for name in ("reverse_kl", "forward_kl", "logprobs"):
        if getattr(expected, name).numel():
            pairs[name] = getattr(found, name), getattr(expected, name)
    for name, needed in need._asdict().items():
        if needed:
            grads = (getattr(x, f"grad_{name}").double() * x.scale for x in (found, expected))
            a, b = grads
            pairs[f"{name} gradient"] = a, b
    return {name: error(a, b) for name, (a, b) in pairs.items()}
