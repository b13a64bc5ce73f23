"""The rows in PyTorch by themselves: what a token that is left out may hold."""

import pytest
import torch

from opcd_kernels.options import KINDS, Options
from opcd_kernels.rows import Rows, empty_found
from opcd_kernels.rows_torch import divergence_rows_

V = 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", [float("inf"), float("nan"), 1e38])
def test_a_row_of_factor_zero_has_no_gradient(kind: str, what: float) -> None:
    """On a GPU it cannot be taken out without a wait, and one NaN spoils the head's gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, V, generator=generator).unbind()
    student[1] = teacher[1] = what
    kept = torch.tensor([1.0, 0.0, 1.0])
    rows = Rows(0 * kept if kind == "none" else kept)
    rows = rows._replace(target_ids=torch.tensor([3, 4, 5]), target_factors=kept.clone())
    if kind == "mixture":
        rows = rows._replace(forward_shares=torch.full((3,), 0.3))
    found = empty_found(student, rows)
    options = Options(kind, 0.5, 1.0, None, None, V)
    divergence_rows_(student, teacher, None, None, rows, found, options, True)
    assert found.dz[1].eq(0).all()
    assert found.dz[[0, 2]].isfinite().all()
    assert found.dz[[0, 2]].ne(0).any(1).all()
