"""Heads that are sharded over processes: gathered for the loss, their gradients averaged."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from opcd_kernels import linear_divergence

RANKS, TOKENS = 2, 5


def same_gradients_as_one_process(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)  # the same model and batch on every rank
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 51))
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (RANKS,))
    for module in (*sharded, sharded):
        fully_shard(module, mesh=mesh)
    inputs, teacher_hidden = torch.randn(2, RANKS * TOKENS, 8)
    teacher_weight = torch.randn(51, 8)

    head = plain[1]
    loss = linear_divergence(
        plain[0](inputs), head.weight, teacher_hidden, teacher_weight, student_bias=head.bias
    ).loss
    loss.backward()

    mine = slice(rank * TOKENS, (rank + 1) * TOKENS)
    head = sharded[1]
    assert isinstance(head.weight, DTensor)
    out = linear_divergence(
        sharded[0](inputs[mine]),
        head.weight,
        teacher_hidden[mine],
        distribute_tensor(teacher_weight, mesh),
        student_bias=head.bias,
    )
    out.loss.backward()

    for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
        assert isinstance(a.grad, DTensor)
        assert a.grad.placements == a.placements
        torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-7)

    hidden = DTensor.from_local(torch.ones(3, 8), mesh, [Replicate()])
    with pytest.raises(ValueError, match="to_local"):
        linear_divergence(hidden, teacher_weight, torch.ones(3, 8), teacher_weight)
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that takes leave of them


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="its gloo sums where it is asked to average"
)
def test_fsdp2_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(
        same_gradients_as_one_process, (str(tmp_path / "rendezvous"),), nprocs=RANKS
    )
