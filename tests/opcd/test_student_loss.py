"""The student's side as one module: from episodes and from tensors, in one process and in two."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import FalconConfig, FalconForCausalLM

from opcd.episodes import Episode, Span
from opcd.errors import InputError
from opcd.models.lm import switch_off_dropout
from opcd.objective import Targets
from opcd.passes.hidden import Row
from opcd.passes.plan import find_plan, planned_hidden
from opcd.student_loss import StudentLoss
from opcd.teacher import SharedPrefixTeacher
from tests.conftest import tiny_llama

PREFIX = [*range(3, 40)]
SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 21, 22], [30, 31, 32, 33, 34]]
SPANS = [[(2, 2), (5, 2)], [(2, 2)], [(1, 4)]]  # start and length of what is scored; two turns


def episodes() -> list[Episode]:
    return [
        Episode(ids, ids, tuple(Span(start, start, n) for start, n in spans))
        for ids, spans in zip(SEQUENCES, SPANS, strict=True)
    ]


def padded(left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, completion mask and attention mask, pads on one side."""
    ids, scored, real = (torch.zeros(3, 9, dtype=torch.long) for _ in range(3))
    for i, (row, spans) in enumerate(zip(SEQUENCES, SPANS, strict=True)):
        at = 9 - len(row) if left else 0
        ids[i, at : at + len(row)] = torch.tensor(row)
        real[i, at : at + len(row)] = 1
        for start, n in spans:
            scored[i, at + start : at + start + n] = 1
    return ids, scored, real


def models() -> tuple[torch.nn.Module, SharedPrefixTeacher]:
    torch.manual_seed(0)
    student = tiny_llama().requires_grad_(True)
    torch.manual_seed(1)
    return student, SharedPrefixTeacher(tiny_llama(), PREFIX)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def plain_loss(student: Any, teacher: SharedPrefixTeacher) -> Tensor:
    """Mean reverse KL of the scored tokens, each sequence alone, by plain autograd."""
    terms = []
    for ids, spans in zip(SEQUENCES, SPANS, strict=True):
        ours = student(torch.tensor([ids])).logits[0].log_softmax(-1)
        theirs = (
            teacher.model(torch.tensor([PREFIX + ids])).logits[0, len(PREFIX) :].log_softmax(-1)
        )
        for start, n in spans:
            log_s, log_t = (x[start - 1 : start + n - 1] for x in (ours, theirs))
            terms.append((log_s.exp() * (log_s - log_t)).sum(-1))
    return torch.cat(terms).mean()


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("form", ["episodes", "lists", "right", "left"])
def test_the_loss_is_that_of_each_sequence_alone(form: str, planned: bool) -> None:
    student, teacher = models()
    plain = plain_loss(student, teacher)
    plain.backward()
    expected = gradients(student)
    student.zero_grad()
    loss = StudentLoss(student, *([find_plan(student, PREFIX)] if planned else []))
    targets = teacher.score(episodes())
    if form == "episodes":
        out = loss(episodes(), targets)
    elif form == "lists":
        masks = [
            [int(any(a <= t < a + n for a, n in spans)) for t in range(len(ids))]
            for ids, spans in zip(SEQUENCES, SPANS, strict=True)
        ]
        out = loss(SEQUENCES, targets, completion_mask=masks)
    else:
        ids, scored, real = padded(form == "left")
        out = loss(ids, targets, completion_mask=scored, attention_mask=real)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(plain.item(), rel=1e-4)
    for name, grad in gradients(student).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-6)


def test_without_a_sequence_there_is_no_loss() -> None:
    student, teacher = models()
    with pytest.raises(InputError, match="there must be sequences to score, got none"):
        StudentLoss(student)([], teacher.score([]))


def test_dropout_is_off_also_where_a_layer_asks_the_configuration() -> None:
    config = FalconConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout=0.5,
    )
    student = FalconForCausalLM(config).eval()
    switch_off_dropout(student)
    student.train()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(student(ids).logits, student(ids).logits)


def test_a_shared_start_is_read_with_the_frequencies_of_whole_sequences() -> None:
    """It and all prompts lie below the limit, every sequence above it."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    student = tiny_llama(rope_parameters=rope | {"original_max_position_embeddings": 80})
    start = [5 + i % 90 for i in range(70)]
    ids = [[*start, 100 + i, *range(120, 140)] for i in range(4)]
    rows = [Row(row, ((71, 20),)) for row in ids]
    plan = find_plan(student, start)._replace(mode="padded")
    found = planned_hidden(student, rows, plan)
    with torch.no_grad():
        whole = student.model(torch.tensor(ids), use_cache=False).last_hidden_state[:, 70:90]
    torch.testing.assert_close(found, whole.flatten(0, 1), rtol=1e-3, atol=1e-4)


def test_sequences_on_both_sides_of_a_rotary_limit_are_refused() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    student = tiny_llama(rope_parameters=rope | {"original_max_position_embeddings": 5})
    targets = models()[1].score(episodes())
    with pytest.raises(InputError, match="must lie on one side of 5 tokens, got 3 to 6"):
        StudentLoss(student)(episodes(), targets)


def test_a_share_of_forward_kl_a_token() -> None:
    student, teacher = models()
    ids, scored, real = padded(left=True)
    targets = teacher.score(episodes())
    shares = torch.tensor([0.0] * 5 + [1.0] * 5)
    out = StudentLoss(student)(
        ids, targets, completion_mask=scored, attention_mask=real, forward_share=shares
    )
    assert torch.equal(out.per_token[:5], out.reverse_kl[:5])
    assert torch.equal(out.per_token[5:], out.forward_kl[5:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_mask": torch.ones(3, 8)}, "completion_mask must have the shape of input_ids"),
        ({"attention_mask": torch.ones(2, 9)}, "attention_mask must have the shape of input_ids"),
        ({"completion_mask": torch.ones(3, 9)}, "must mark real tokens behind the first one"),
        ({"completion_mask": torch.zeros(3, 9)}, "leave out sequences without a completion"),
        ({"attention_mask": torch.tensor([[1, 0] * 4 + [1]] * 3)}, "got 5 runs of them in row 0"),
        ({"attention_mask": None}, "a row for each scored token|behind the first one|got 10 for"),
    ],
)
def test_masks_that_do_not_fit(change: dict, message: str) -> None:
    student, teacher = models()
    ids, scored, real = padded(left=False)
    targets = teacher.score(episodes())
    if change == {"attention_mask": None}:  # right pads need none: no real token sees them
        out = StudentLoss(student)(ids, targets, completion_mask=scored)
        assert out.loss.isfinite()
        change = {"targets": targets.of([0, 1])}
    arguments = {"targets": targets, "completion_mask": scored, "attention_mask": real} | change
    with pytest.raises(InputError, match=message):
        StudentLoss(student)(ids, **arguments)


def two_processes(rank: int, rendezvous: str) -> None:
    """Each wrapper, on half of the sequences a rank, against one process with all of them."""
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    student, teacher = models()
    whole, count = episodes(), sum(e.scored_tokens for e in episodes())
    StudentLoss(student)(whole, teacher.score(whole)).loss.backward()
    expected = gradients(student)
    mine = whole[:1] if rank == 0 else whole[1:]
    targets: Targets = teacher.score(mine)
    # The mean over processes is undone by their number.
    weights = torch.full((len(targets.hidden),), dist.get_world_size() / count)
    mesh = init_device_mesh("cpu", (2,))
    for wrapper in ("ddp", "fsdp2"):
        loss = StudentLoss(models()[0])
        if wrapper == "ddp":
            wrapped = DistributedDataParallel(loss)
        else:
            for layer in loss.student.model.layers:
                fully_shard(layer, mesh=mesh)
            wrapped = fully_shard(loss, mesh=mesh)
        optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        wrapped(mine, targets, weights).loss.backward()
        for name, p in loss.student.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(
                grad, expected[name], rtol=1e-3, atol=1e-6, msg=f"{wrapper} {name}"
            )
        optimizer.step()
        for p in loss.parameters():
            weight = p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
            both = [torch.empty_like(weight) for _ in range(2)]
            dist.all_gather(both, weight.contiguous())
            assert torch.equal(*both), wrapper
    dist.barrier()
    os._exit(0)  # gloo's threads now and then abort a process that takes leave of them


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="its gloo sums where it is asked to average"
)
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(two_processes, (str(tmp_path / "rendezvous"),), nprocs=2)
