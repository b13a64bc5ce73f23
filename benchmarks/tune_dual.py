"""Which tile of the dual product a GPU likes best, and how close it is to the library's products.

    python -m benchmarks.tune_dual                prints a table
    python -m benchmarks.tune_dual --save NAME    and keeps its rows in results/tune-NAME.json

One chunk of 2048 tokens of the reverse KL. `forward_s` is the whole way from hidden states to the
gradient in the logits, `product_s` the dual product alone, `tflops` its rate, `rows_gbs` the memory
traffic of the kernel behind it. The first row of a shape, "library", is the other design: two
library products into fp32 logits, and one kernel over them. A tile whose gradient is wrong, or that
the compiler refuses, says so and is not timed.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from benchmarks.providers import tensors
from benchmarks.rows import RESULTS, origin, write
from opcd_kernels import reference
from opcd_kernels.chunks import chunk_divergence
from opcd_kernels.dual_triton import DualProduct, Tile
from opcd_kernels.options import Options
from opcd_kernels.products import products_for
from opcd_kernels.rows import Rows

TOKENS = 2048
CHECKED = 64  # tokens
SHAPES = [(576, 49152), (896, 151936), (2048, 151936), (4096, 151936)]  # D, V
TILES = [
    Tile(),
    Tile(programs=0),
    Tile(stages=3),
    Tile(group=4),
    Tile(depth=128, stages=2),
    Tile(tokens=64, threads=128, stages=3, programs=2),  # two fit a multiprocessor
    Tile(tokens=64, threads=128, stages=3, programs=0),
    Tile(entries=64, threads=128, stages=3, programs=2),
    Tile(tokens=64, entries=256, stages=3),
]
FACTS = ("forward_s", "product_s", "tflops", "rows_gbs", "gradient_error")
Timer = Callable[[Callable[[], object]], float]  # seconds of a call


def on_gpu(call: Callable[[], object]) -> float:
    """Median over a quarter of a second."""
    return triton.testing.do_bench(call, rep=250, return_mode="median") / 1000


def measure(
    d: int, v: int, tiles: list[Tile], device: torch.device, timer: Timer, shared: bool, n: int
) -> Iterator[dict]:
    """A row for the library's products, and one a tile."""
    h_s, w_s, h_t, w_t = tensors(n, d, v, device, shared=shared)
    inputs = h_s, h_t, torch.full((n,), 1 / n, device=device)
    options = Options("reverse_kl", 0.5, 1.0, None, None, v)
    exact = gradient(h_s[:CHECKED], w_s, h_t[:CHECKED]) / n
    facts = {"D": d, "V": v, "N": n, "shared": shared}
    library = library_seconds((w_s, w_t), inputs, options, timer)
    yield {**facts, "tile": "library", "forward_s": library}
    for tile in tiles:
        row = {**facts, "tile": "x".join(map(str, tile))}
        try:
            dual = DualProduct(w_s, w_t, n, options, need_grad=True, tile=tile)
            dz = dual(*inputs)[2][:CHECKED].double()
        except (triton.CompilationError, triton.runtime.errors.OutOfResources) as refused:
            yield {**row, "refused": str(refused).splitlines()[0]}
            continue
        error = ((dz - exact).norm() / exact.norm()).item()
        if error < 0.004:
            yield {**row, "gradient_error": float(f"{error:.2g}"), **times(dual, inputs, timer)}
        else:
            yield {**row, "refused": f"gradient error {error:.2%}"}


def library_seconds(
    heads: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...], options: Options, timer: Timer
) -> float:
    products = products_for(heads[0].device, torch.bfloat16)
    n = len(inputs[0])
    library = chunk_divergence(products, heads, (None, None), n, options, True, "triton")
    h_s, h_t, factors = inputs
    return timer(lambda: library(h_s, h_t, Rows(factors)))


def times(dual: DualProduct, inputs: tuple[Tensor, ...], timer: Timer) -> dict[str, float]:
    forward, product = timer(lambda: dual(*inputs)), timer(lambda: dual.product(*inputs[:2]))
    (n, d), v = inputs[0].shape, dual.options.vocab_size
    return {
        "forward_s": forward,
        "product_s": product,
        "tflops": round(4 * n * d * v / product / 1e12, 1),
        "rows_gbs": round(6.2 * n * v / max(forward - product, 1e-9) / 1e9),
    }


def gradient(h_s: Tensor, w_s: Tensor, h_t: Tensor) -> Tensor:
    """In the logits of the sum over the tokens, in fp64; one head for both models."""
    z_s, z_t = (reference.logits(h.double(), w_s.double()) for h in (h_s, h_t))
    z_s.requires_grad_()
    (found,) = torch.autograd.grad(reference.divergence(z_s, z_t, "reverse_kl", 0.5).sum(), z_s)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", metavar="NAME", help="keep the rows in results/")
    save = parser.parse_args().save
    if not torch.cuda.is_available():
        parser.exit(1, "a tile is tuned on the GPU that is to run it; there is none here\n")
    rows = []
    for (d, v), shared in itertools.product(SHAPES, (False, True)):
        print(f"\nD {d}, V {v}, {'one head' if shared else 'two heads'}, {TOKENS} tokens")
        for row in measure(d, v, TILES, torch.device("cuda"), on_gpu, shared, TOKENS):
            rows.append(row)
            keys = ("forward_s", "product_s", "tflops", "rows_gbs", "gradient_error", "refused")
            facts = "  ".join(
                f"{k} {row[k]:.4g}" if k != "refused" else row[k] for k in keys if k in row
            )
            print(f"{row['tile']:>24}  {facts}", flush=True)
    if save:
        file = RESULTS / f"tune-{save}.json"
        shared = origin()
        write(({**shared, **row} for row in rows), file)
        print(f"written: {file}")


if __name__ == "__main__":
    main()
