"""Which design of the loss, block and tile this GPU likes best; `backend="auto"` takes them.

    python -m opcd_kernels.tune                     at the shapes of some models
    python -m opcd_kernels.tune --shape D V ...     at those of yours: hidden size, vocabulary

The candidates are "triton" with blocks of some hundred tokens (`sizes.py`) and, where the device
has what it needs, "triton_dual" with several tiles. Each computes loss and gradients of 4096 tokens
in bf16, reverse KL, with a trained head (two matrices) and a frozen one (one for both models). What
differs from the plain PyTorch of backend "torch" is not timed, nor what the compiler or the memory
refuses. Times are medians by CUDA events after a warm-up. The choice is kept in the user's cache
(`tuned.py`) and read at the next start.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from opcd_kernels import tuned
from opcd_kernels.backends import check_backend
from opcd_kernels.chunks import Gradients, Inputs, Result, Work, loss_and_gradients
from opcd_kernels.options import Options
from opcd_kernels.tuned import HEADS, Row, Tuned

TOKENS = 4096
SHAPES = [(576, 49152), (896, 151936), (2048, 151936), (4096, 151936)]  # D, V
BLOCKS = (256, 384, 512, 1024)
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
    """`dual`: the device has what "triton_dual" needs."""
    found = [Candidate("triton", Tuned(block=block)) for block in BLOCKS]
    return found + [Candidate("triton_dual", Tuned(tile=tile)) for tile in TILES if dual]


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
        except (triton.CompilationError, TritonError, torch.OutOfMemoryError) as refused:
            yield Timed(candidate, None, str(refused).splitlines()[0])


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
    """Median over a second, by CUDA events, after a tenth of one."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=100, rep=1000, return_mode="median")) / 1000


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
    shapes = parser.parse_args().shape or SHAPES
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
    for (d, v), head in itertools.product(shapes, HEADS):
        print(f"\n{name}: D {d}, V {v}, {head} head, {TOKENS} tokens")
        timed = []
        try:
            for one in measure(problem(TOKENS, d, v, head, device), head, tried, on_gpu):
                timed.append(one)
                found = one.refused if one.seconds is None else f"{1000 * one.seconds:.3f} ms"
                print(f"  {one.candidate!s:40} {found}", flush=True)
        except torch.OutOfMemoryError:
            print("  left out: the memory does not hold it")
        row = choice(name, d, v, head, timed)
        if row is not None:  # kept at once: what is interrupted has not been for nothing
            tuned.write(file, key, tuned.merged(tuned.read(file, key), [row]))
            print(f"  auto takes {min(row['seconds'], key=row['seconds'].__getitem__)}")
    print(f"\nkept in {file}")


if __name__ == "__main__":
    main()
