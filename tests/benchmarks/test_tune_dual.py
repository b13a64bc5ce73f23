"""Tuning runs to its end where the interpreter stands for the GPU."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.tune_dual import measure
from opcd_kernels.dual_triton import DualProduct, Tile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")
CPU = torch.device("cpu")


def once(call: Callable[[], object]) -> float:
    call()
    return 0.5


@pytest.mark.parametrize("shared", [False, True])
def test_every_tile_is_checked_and_timed(shared: bool) -> None:
    tiles = [Tile(), Tile(64, 128, 32, threads=128)]
    library, *rows = measure(64, 300, tiles, CPU, once, shared, n=96)
    assert library["tile"] == "library"
    assert library["forward_s"] == 0.5
    assert [row["tile"] for row in rows] == ["128x128x64x16x256x4x1", "64x128x32x16x128x4x1"]
    assert all(0 < row["gradient_error"] < 0.004 for row in rows)
    assert all(row["tflops"] >= 0 for row in rows)


def test_a_tile_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DualProduct.__call__

    def wrong(self: DualProduct, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value, entropy, dz, scratch = right(self, *inputs)
        return value, entropy, 1.01 * dz, scratch

    monkeypatch.setattr(DualProduct, "__call__", wrong)
    _, row = measure(64, 300, [Tile()], CPU, once, False, n=96)
    assert "gradient error" in row["refused"]
    assert "forward_s" not in row
