"""What rounding explains is measured in passes as large as those that are judged."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import opcd.passes.agreement as agreement
from opcd.passes.agreement import Agreement, rounding
from opcd.passes.hidden import Row, scored_hidden
from tests.conftest import tiny_llama

ROWS = [Row(list(range(5, 5 + n)), [(3, n - 3)]) for n in (12, 9)]


@torch.no_grad()
def test_the_noise_takes_no_larger_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    hidden = scored_hidden(model, ROWS)
    passes = []

    def counted(lm: Any, rows: Sequence[Row], *more: Any) -> torch.Tensor:
        passes.append(len(rows))
        return scored_hidden(lm, rows, *more)

    monkeypatch.setattr(agreement, "scored_hidden", counted)
    found = Agreement(model, hidden, ROWS, hidden)
    assert found.wrong(hidden) is None
    assert not passes, "nothing to explain"
    assert "more than the" in str(found.wrong(1.1 * hidden))
    assert passes == [2] * agreement.NOISE_PASSES


@pytest.mark.parametrize(
    ("chosen", "expected"), [("none", 2**-23), ("ieee", 2**-23), ("tf32", 2**-10), ("bf16", 2**-7)]
)
def test_the_rounding_of_products_is_the_backends(chosen: str, expected: float) -> None:
    """torch's older question raises where the precision was chosen a backend at a time."""
    matmul: Any = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = chosen
        assert rounding(tiny_llama()) == expected
    finally:
        matmul.fp32_precision = before
