"""What benchmarks are run with: a fixture that times them, and where their rows go."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.rounds import Rounds
from benchmarks.rows import Row, origin, write

ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--rows", type=Path, metavar="FILE", help="where to write what is found")
    group.addoption(
        "--tokens",
        type=lambda text: [int(n) for n in text.split(",")],
        metavar="N,N,...",
        help="bench_loss: these numbers of tokens",
    )
    group.addoption(
        "--hidden",
        type=Path,
        metavar="FILE",
        help="bench_loss: hidden states that python -m benchmarks.hidden_states kept",
    )


@pytest.fixture
def benchmark(request: pytest.FixtureRequest) -> Iterator[Rounds]:
    """Times a benchmark; its row is kept at once, unless nothing was timed."""
    rounds = Rounds()
    yield rounds
    if not rounds.seconds:
        return
    rows = request.config.stash.setdefault(ROWS, [])
    rows.append({**origin(), "question": request.node.originalname, **rounds.row()})
    if file := request.config.getoption("--rows"):
        write(rows, file)


@pytest.fixture(autouse=True, scope="session")
def _no_cudnn_attention() -> Iterator[None]:
    """Everybody attends without cuDNN, as ours does by itself: it plans anew for every shape of a
    batch, which would make a peer slower than it is."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)
