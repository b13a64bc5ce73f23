"""The kernel of the rows by itself: where the gradient goes."""

import pytest
import torch

pytest.importorskip("triton")

from opcd_kernels.options import Options
from opcd_kernels.rows import Rows, empty_found
from opcd_kernels.rows_torch import divergence_rows_ as plain_rows_
from opcd_kernels.rows_triton import divergence_rows_, row_width
from opcd_kernels.terms_triton import INTERPRETED

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_beyond_two_to_the_31(device: str) -> None:
    """Entries of the third row lie further behind those of the first than 31 bits reach.

    Of the 4 GiB between them nothing is touched, and on a CPU nothing is there.
    """
    v, stride = 100, 2**30 + 64
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = torch.randn(2, 3, row_width(v), generator=generator).unbind()
    z_s[:, v:] = z_t[:, v:] = -torch.inf
    options = Options("reverse_kl", 0.5, 1.0, None, None, v)
    rows = Rows(torch.ones(3), None, None, None)
    expected = empty_found(z_s[:, :v].clone(), rows)
    plain_rows_(expected.dz, z_t[:, :v].clone(), None, None, rows, expected, options, True)

    memory = torch.empty(2 * stride + row_width(v), dtype=torch.bfloat16, device=device)
    dz = memory.as_strided((3, v), (stride, 1)).fill_(torch.nan)
    there = rows._replace(factors=rows.factors.to(device))
    found = empty_found(dz, there)
    student, teacher = (z.to(device)[:, :v] for z in (z_s, z_t))
    divergence_rows_(student, teacher, None, None, there, found, options, True)
    error = (dz.float().cpu() - expected.dz).norm() / expected.dz.norm()
    assert error < 0.004  # what bf16 keeps
    assert torch.allclose(found.per_token.cpu(), expected.per_token, rtol=1e-5)
