"""Loss and gradients of one lm_head: every provider against the products that nobody can avoid.

bf16 inputs, student and teacher nearly equal as in training, with a trained head (four products)
and a frozen one, which is one matrix for both models (three). Each provider's gradient on the first
tokens is compared with fp64 before it is timed; one of ours that is wrong is not timed. Before
every round of another provider ours is timed too, so that `times_ours` compares neighbours;
`floor_share` is the time of the products alone, interleaved the same way, in that of the provider.
`rates_floor_share` and `sheet_floor_share` are the same of what `floors.loss` counts, at the rates
that `rates.py` measured and that the device's data sheet promises. On a GPU a row has as many
rounds as fit into ROW_SECONDS, three at least.

    N tokens, D hidden size, V vocabulary; floor: the products of the head alone, in bf16
    divergence   reverse_kl, forward_kl, jsd (the middle of both), mixture (half of either KL)
    call         alone; or in a step: the head a weight in fp32 under autocast, its .grad there
    hidden       gaussian; or of a real training step, where --hidden names a file that
                 `python -m benchmarks.hidden_states` kept: with its heads and its sizes

--tokens 256,65536 puts other numbers of tokens in the place of SWEEP. Without a GPU the cases are
few and small.
"""

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import floors, rates
from benchmarks.hidden_states import recorded, recorded_steps
from benchmarks.memory import peak_mib
from benchmarks.providers import (
    OURS,
    PROVIDERS,
    Inputs,
    Unavailable,
    exact_gradients,
    gradient_error,
    gradients,
    in_a_step,
    tensors,
)
from benchmarks.rounds import Rounds

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BASELINE = "ours-triton" if ON_GPU else "ours-torch"
ROUNDS = 7 if ON_GPU else 5
ROW_SECONDS = 1.0 if ON_GPU else float("inf")
CHECKED = 1024 if ON_GPU else 256  # tokens; on a GPU a chunk of Liger's, so that it compiles once
GAUSSIAN = "gaussian"


class Case(NamedTuple):
    """What is computed."""

    n: int
    d: int
    v: int
    head: str = "trained"  # or "frozen"
    divergence: str = "reverse_kl"
    call: str = "alone"  # or "in a step"
    hidden: str = GAUSSIAN  # or "step 0", "step 50", ...

    def __str__(self) -> str:
        parts = [f"{self.n}x{self.d}x{self.v}", *self[3:]]
        return "-".join(parts).replace(" ", "_")


# The first is everybody's; on a GPU the others take part nowhere else: every shape costs them
# seconds of compilation.
MAIN = Case(8192, 2048, 151936) if ON_GPU else Case(1024, 576, 49152)
EVERYWHERE = ("ours-triton", "ours-triton-dual", "plain-checkpointed", "trl", "liger-fused")
if not ON_GPU:
    EVERYWHERE = ("ours-torch", "plain-checkpointed", "trl", "liger-chunked")
SWEEP = [256, 1024, 4096, 16384, 65536] if ON_GPU else [256, 4096]  # tokens
SHAPES = [(576, 49152), (896, 151936), (4096, 151936)] if ON_GPU else []  # D, V


def cases(tokens: list[int], file: Path | None) -> list[Case]:
    """All of them, the most telling ones first."""
    n = MAIN.n
    return [
        MAIN,
        MAIN._replace(call="in a step"),
        MAIN._replace(head="frozen"),
        *(MAIN._replace(divergence=kind) for kind in ("forward_kl", "jsd", "mixture")),
        *(Case(*sizes, hidden=step) for step, sizes in recorded_steps(file).items()),
        *(MAIN._replace(n=count) for count in tokens if count != n),
        *(Case(n, d, v) for d, v in SHAPES),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    tokens = config.getoption("--tokens") or SWEEP
    found = cases(tokens, config.getoption("--hidden"))
    metafunc.parametrize("case", found, ids=str, scope="module")


@pytest.fixture(scope="module")
def inputs(case: Case, request: pytest.FixtureRequest) -> Inputs:
    if case.hidden == GAUSSIAN:
        return tensors(case.n, case.d, case.v, DEVICE, shared=case.head == "frozen")
    return recorded(request.config.getoption("--hidden"), case.hidden, DEVICE)


@pytest.fixture(scope="module")
def exact(inputs: Inputs, case: Case) -> Callable[[], list[Tensor]]:
    """Gradients in fp64, once a case."""
    return functools.cache(
        lambda: exact_gradients(first(inputs), case.divergence, case.head == "frozen")
    )


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


def pass_of(name: str, case: Case, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """A provider's loss and gradients. Raises Unavailable."""
    provider = PROVIDERS[name](DEVICE, case.divergence)
    if case.call == "alone":
        return lambda: gradients(provider, inputs, case.head == "frozen")
    return in_a_step(provider, inputs)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_loss(
    benchmark: Rounds,
    provider: str,
    case: Case,
    inputs: Inputs,
    exact: Callable[[], list[Tensor]],
) -> None:
    if provider not in EVERYWHERE and case != MAIN:
        pytest.skip(f"takes part at {MAIN} only")
    frozen = case.head == "frozen"
    torch.compiler.reset()  # or what it met before makes this provider's kernels dynamic or eager
    try:
        error = gradient_error(pass_of(provider, case, first(inputs))(), exact())
        assert provider not in OURS or error < 0.005, f"gradient error {error:.2%}: not timed"
        timed = pass_of(provider, case, inputs)
        peak = peak_mib(DEVICE, timed)
        baseline = pass_of(BASELINE, case, inputs)
        ours: list[float] = []
        floor: list[float] = []

        def neighbours() -> None:
            floor.append(seconds(lambda: products(inputs, frozen)))
            ours.append(seconds(baseline))
            synchronize()

        def call() -> None:
            timed()
            synchronize()

        neighbours()  # compiles
        fitting = ROW_SECONDS / (seconds(neighbours) + seconds(call))
        floor.clear()
        ours.clear()
        benchmark.time(call, max(3, int(min(fitting, ROUNDS))), before=neighbours)
    except Unavailable as reason:
        pytest.skip(str(reason))
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    median = benchmark.median
    in_step = case.call == "in a step"
    held = [inputs[0], *([] if frozen or in_step else [inputs[1]])]
    results = sum(x.nbytes for x in held) / 2**20
    work = floors.loss(case.n, case.d, case.v, not frozen, into_grad=in_step)
    sheet = rates.sheet(DEVICE)
    benchmark.facts |= {
        "question": "loss",
        "provider": provider,
        "N": case.n,
        "D": case.d,
        "V": case.v,
        "dtype": "bfloat16",
        "head": case.head,
        "divergence": case.divergence,
        "call": case.call,
        "hidden": case.hidden,
        "peak_mib": None if peak is None else round(peak),
        "scratch_mib": None if peak is None else round(peak - results),
        "gradient_error": float(f"{error:.2g}"),
        "floor_share": round(statistics.median(floor) / median, 3),
        "rates_floor_share": round(floors.floor_s([work], rates.measured(DEVICE)) / median, 3),
        "sheet_floor_share": sheet and round(floors.floor_s([work], sheet) / median, 3),
        "times_ours": round(median / statistics.median(ours), 2),
    }
