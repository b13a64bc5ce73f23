"""Loss and gradients of one lm_head: every provider against the products that nobody can avoid.

bf16 inputs, student and teacher nearly equal as in training, with a trained head (four products)
and a frozen one, which is one matrix for both models (three). Each provider's gradient on the first
tokens is compared with fp64 before it is timed; one of ours that is wrong is not timed. Before
every round of another provider ours is timed too, so that `times_ours` compares neighbours;
`floor_share` is the time of the products alone, interleaved the same way, in that of the provider.
On a GPU a row has as many rounds as fit into ROW_SECONDS, three at least. The `times_ours` of a
`-mixture` is what the forward KL costs beside the reverse KL.

    N tokens, D hidden size, V vocabulary; floor: the products of the head alone, in bf16
"""

import functools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_mib
from benchmarks.providers import (
    OURS,
    PROVIDERS,
    Loss,
    Unavailable,
    definition,
    gradient_error,
    gradients,
    tensors,
)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BASELINE = "ours-triton" if ON_GPU else "ours-torch"
SHAPES = (
    [
        (8192, 576, 49152),
        (8192, 896, 151936),
        (8192, 2048, 151936),
        (8192, 4096, 151936),
    ]
    if ON_GPU
    else [(1024, 576, 49152)]
)
FROZEN = SHAPES[2:3] if ON_GPU else SHAPES  # every case costs compile time
# On a GPU the others take part in one case: every shape costs them seconds of compilation.
EVERYWHERE = ("ours-triton", "ours-triton-dual", "trl", "liger-fused") if ON_GPU else PROVIDERS
CASES = [(shape, False) for shape in SHAPES] + [(shape, True) for shape in FROZEN]
ROUNDS = 7 if ON_GPU else 5
ROW_SECONDS = 1.0 if ON_GPU else float("inf")
CHECKED = 1024 if ON_GPU else 256  # tokens; on a GPU a chunk of Liger's, so that it compiles once
Inputs = tuple[Tensor, ...]
Case = tuple[tuple[int, int, int], bool]


def name(case: Case) -> str:
    shape, frozen = case
    return "x".join(map(str, shape)) + ("-frozen" if frozen else "-trained")


@pytest.fixture(scope="module", params=CASES, ids=name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def shape(case: Case) -> tuple[int, int, int]:
    return case[0]


@pytest.fixture(scope="module")
def frozen(case: Case) -> bool:
    return case[1]


@pytest.fixture(scope="module")
def inputs(shape: tuple[int, int, int], frozen: bool) -> Inputs:
    return tensors(*shape, DEVICE, shared=frozen)


@pytest.fixture(scope="module")
def exact(inputs: Inputs, frozen: bool) -> Callable[[Loss], list[Tensor]]:
    """Gradients of a definition in fp64."""

    @functools.cache
    def of(loss: Loss) -> list[Tensor]:
        return gradients(loss, tuple(x.double() for x in first(inputs)), frozen)

    return of


def first(inputs: Inputs) -> Inputs:
    h_s, w_s, h_t, w_t = inputs
    return h_s[:CHECKED], w_s, h_t[:CHECKED], w_t


@torch.no_grad()
def products(inputs: Inputs, frozen: bool) -> None:
    """What the exact loss and its gradients cannot do without."""
    h_s, w_s, h_t, w_t = inputs
    for a, b in zip(h_s.split(4096), h_t.split(4096), strict=True):
        z = a @ w_s.T
        torch.mm(b, w_t.T, out=z)
        z @ w_s
        if not frozen:
            z.T @ a


def seconds(call: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_loss(
    benchmark: Callable,
    provider: str,
    shape: tuple[int, int, int],
    inputs: Inputs,
    frozen: bool,
    exact: Callable[[Loss], list[Tensor]],
) -> None:
    if provider not in EVERYWHERE and (shape, frozen) != (FROZEN[0], False):
        pytest.skip(f"takes part at {FROZEN[0]} only")
    torch.compiler.reset()  # or what it met before makes this provider's kernels dynamic or eager
    try:
        loss: Loss = PROVIDERS[provider](DEVICE)
        found = gradients(loss, first(inputs), frozen)
        error = gradient_error(found, exact(definition(provider)))
        assert provider not in OURS or error < 0.005, f"gradient error {error:.2%}: not timed"
        peak = peak_mib(DEVICE, lambda: gradients(loss, inputs, frozen))
    except Unavailable as reason:
        pytest.skip(str(reason))
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    baseline = PROVIDERS[BASELINE](DEVICE)
    ours: list[float] = []
    floor: list[float] = []

    def neighbours() -> None:
        floor.append(seconds(lambda: products(inputs, frozen)))
        ours.append(seconds(lambda: gradients(baseline, inputs, frozen)))

    def call() -> None:
        gradients(loss, inputs, frozen)
        synchronize()

    neighbours()  # compiles
    fitting = ROW_SECONDS / (seconds(neighbours) + seconds(call))
    floor.clear()
    ours.clear()
    benchmark.pedantic(call, setup=neighbours, rounds=max(3, int(min(fitting, ROUNDS))))
    median = benchmark.stats.stats.median
    n, d, v = shape
    results = sum(x.nbytes for x in (inputs[0], *([] if frozen else [inputs[1]]))) / 2**20
    benchmark.extra_info |= {
        "question": "loss",
        "provider": provider,
        "N": n,
        "D": d,
        "V": v,
        "dtype": "bfloat16",
        "head": "frozen" if frozen else "trained",
        "peak_mib": None if peak is None else round(peak),
        "scratch_mib": None if peak is None else round(peak - results),
        "gradient_error": float(f"{error:.2g}"),
        "floor_share": round(statistics.median(floor) / median, 3),
        "times_ours": round(median / statistics.median(ours), 2),
    }
