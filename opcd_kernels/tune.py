"""Which design of the loss, block and tile this GPU likes best; `backend="auto"` takes them.

    python -m opcd_kernels.tune                     at the shapes of some models
    python -m opcd_kernels.tune --shape D V ...     at those of yours: hidden size, vocabulary
    python -m opcd_kernels.tune --seconds 50        what fits that time; the rest is named

The candidates are "triton" with blocks of some hundred tokens (`sizes.py`) and, where the device
has what it needs, "triton_dual" with several tiles. Each computes loss and gradients of 4096 tokens
in bf16, reverse KL, with a trained head (two matrices) and a frozen one (one for both models). What
differs from the plain PyTorch of backend "torch" is not timed, nor what the compiler or the memory
refuses. Times are medians by CUDA events after a warm-up. Shapes, heads and candidates come in the
order of what is most worth knowing. The choice is kept in the user's cache (`tuned.py`), case by
case, and read at the next start.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opcd_kernels import tuned
from opcd_kernels.backends import check_backend
from opcd_kernels.chunks import Gradients, Inputs, Result, Work, loss_and_gradients
from opcd_kernels.options import Options
from opcd_kernels.tuned import HEADS, Row, Tuned

TOKENS = 4096
SHAPES = [(2048, 151936), (576, 49152), (4096, 151936), (896, 151936)]  # D, V
BLOCKS = (512, 384, 256, 1024)
TILES = (  # fields of `dual_triton.Tile`
    (128, 128, 64, 16, 256, 4, 1),
    (128, 128, 64, 16, 256, 4, 0),
    (128, 128, 64, 16, 256, 3, 1),
    (128, 128, 64, 4, 256, 4, 1),
    (128, 128, 128, 16, 256, 2, 1),
    (64, 128, 64, 16, 128, 3, 2),  # two fit a multiprocessor
    (64, 128, 64, 16, 128, 3, 0),
    (128, 64, 64, 16, 128, 3, 2),
    (64, 256, 64, 16, 256, 3, 1),
)
ALLOWED = 0.005  # relative to the plain result, 2-norm: what rounding the gradient to bf16 leaves

Timer = Callable[[Callable[[], object]], float]  # seconds of a call


class Candidate(NamedTuple):
    backend: str
    tuned: Tuned

    def __str__(self) -> str:
        block, tile = self.tuned
        return f"{self.backend} {f'block {block}' if block else 'tile ' + 'x'.join(map(str, tile))}"


class Timed(NamedTuple):
    """A candidate, and either its seconds or why there are none."""

    candidate: Candidate
    seconds: float | None
    refused: str = ""


def candidates(dual: bool) -> list[Candidate]:
    """The first of each design first; `dual`: the device has what "triton_dual" needs."""
    blocks = [Candidate("triton", Tuned(block=block)) for block in BLOCKS]
    tiles = [Candidate("triton_dual", Tuned(tile=tile)) for tile in TILES if dual]
    return [*blocks[:1], *tiles[:1], *blocks[1:], *tiles[1:]]


def choice(device_name: str, d: int, v: int, head: str, timed: Iterable[Timed]) -> Row | None:
    """The fastest of each design, as the cache keeps it; None where none could be timed."""
    best: dict[str, Timed] = {}
    for one in timed:
        rival = best.get(one.candidate.backend)
        if one.seconds is not None and (rival is None or one.seconds < (rival.seconds or 0)):
            best[one.candidate.backend] = one
    if not best:
        return None
    triton, dual = best.get("triton"), best.get("triton_dual")
    return {
        **{"device": device_name, "D": d, "V": v, "head": head},
        "seconds": {backend: one.seconds for backend, one in best.items()},
        "block": triton.candidate.tuned.block if triton else None,
        "tile": [*dual.candidate.tuned.tile] if dual else [],
    }


def problem(n: int, d: int, v: int, head: str, device: torch.device) -> Inputs:
    """Models whose logits spread by 2.4 and are a tenth of that apart, in bf16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    hidden, weight = normal(n, d), (normal(v, d) * (2.4 / d**0.5)).bfloat16()
    other = (hidden + 0.1 * normal(n, d)).bfloat16()
    return Inputs(
        hidden.bfloat16(),
        weight,
        None,
        other,
        weight.clone() if head == "trained" else weight,
        None,
        torch.full((n,), 1 / n, device=device),
        *(None, None, None),
    )


def measure(inputs: Inputs, head: str, tried: Iterable[Candidate], timer: Timer) -> Iterator[Timed]:
    """Each candidate, held against backend "torch" and then timed."""
    import triton
    from triton.runtime.errors import TritonError

    need = Gradients(True, head == "trained", False)
    options = Options("reverse_kl", 0.5, 1.0, None, None, len(inputs.student_weight))

    def solved(backend: str, tuning: Tuned) -> Result:
        work = Work(None, torch.bfloat16, backend, need, tuning)
        return loss_and_gradients(inputs, options, work)

    plain = solved("torch", Tuned())
    for candidate in tried:
        try:
            error = difference(solved(*candidate), plain)
            if error > ALLOWED:
                yield Timed(candidate, None, f"differs by {error:.2%} from plain PyTorch")
                continue
            yield Timed(candidate, timer(lambda one=candidate: solved(*one)))  # type: ignore[misc]
        except (triton.CompilationError, TritonError, RuntimeError) as refused:
            if plain.per_token.is_cuda:
                torch.cuda.synchronize()  # raises where the device takes no more work: then it ends
            yield Timed(candidate, None, f"{type(refused).__name__}: {refused}".splitlines()[0])


def difference(found: Result, plain: Result) -> float:
    """The largest of the relative errors of divergences, entropies and gradients."""
    names = "per_token", "entropy", "grad_hidden", "grad_weight"
    pairs = [(getattr(found, name).float(), getattr(plain, name).float()) for name in names]
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs if len(b)]
    return max(error if error == error else float("inf") for error in errors)


def can(device: torch.device, backend: str) -> bool:
    """Whether a backend runs there in bf16."""
    try:
        check_backend(backend, device, torch.bfloat16, plain=True)
    except ValueError:
        return False
    return True


def on_gpu(call: Callable[[], object]) -> float:
    """Median over 0.4 seconds, by CUDA events, after a warm-up."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=400, return_mode="median")) / 1000


def tuning(
    shapes: Iterable[Sequence[int]],  # D, V
    device: torch.device,
    name: str,
    tried: Sequence[Candidate],
    timer: Timer,
    left: Callable[[], bool],  # whether there is time for one more
    tell: Callable[[str], None],
) -> Iterator[Row]:
    """A row for each case of which something was timed; `tell` is told all, and what was not."""
    untimed = []
    for (d, v), head in itertools.product(shapes, HEADS):
        case, timed = f"D {d}, V {v}, {head} head", list[Timed]()
        if not left():
            untimed.append(case)
            continue
        tell(f"\n{name}: {case}, {TOKENS} tokens")
        try:
            for one in measure(problem(TOKENS, d, v, head, device), head, tried, timer):
                timed.append(one)
                found = one.refused if one.seconds is None else f"{1000 * one.seconds:.3f} ms"
                tell(f"  {one.candidate!s:40} {found}")
                if not left():
                    break
        except torch.OutOfMemoryError:
            tell("  left out: the memory does not hold it")
            continue
        untimed += [f"{case}, {candidate}" for candidate in tried[len(timed) :]]
        row = choice(name, d, v, head, timed)
        if row is not None:
            tell(f"  auto takes {min(row['seconds'], key=row['seconds'].__getitem__)}")
            yield row
    if untimed:
        tell("\nnot timed, as the time was over:\n  " + "\n  ".join(untimed))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        "python -m opcd_kernels.tune", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("D", "V"),
        action="append",
        help="hidden size and vocabulary of a head; may be repeated",
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="when to begin with nothing new"
    )
    args = parser.parse_args()
    shapes, end = args.shape or SHAPES, time.monotonic() + args.seconds
    if any(size < 1 for shape in shapes for size in shape):
        parser.error("--shape must be two positive numbers, hidden size and vocabulary")
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not can(device, "triton"):
        parser.exit(
            1, "tuning must run on the GPU that it is for, with Triton, and there is none here\n"
        )
    name = torch.cuda.get_device_name()
    key = tuned.key_of(name)
    file = tuned.cache_file(key)
    tried = candidates(can(device, "triton_dual"))
    for row in tuning(
        *(shapes, device, name, tried, on_gpu),
        left=lambda: time.monotonic() < end,
        tell=lambda line: print(line, flush=True),
    ):  # kept at once: what is interrupted has not been for nothing
        tuned.write(file, key, tuned.merged(tuned.read(file, key), [row]))
    print(f"\nkept in {file}")


if __name__ == "__main__":
    main()
