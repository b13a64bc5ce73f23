"""Models without numbers: what is counted on them is what real ones take."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opcd.models.lm import autocast
from opcd.passes.hidden import Row
from opcd.passes.plan import Plan, find_plan, planned_hidden
from opcd.preflight.memory import _plan
from opcd.preflight.weightless import Tally, Weightless, nbytes
from tests.opcd.architectures import ARCHITECTURES, build

CPU = torch.device("cpu")
PREFIX = list(range(40, 60))
ROWS = [Row(list(range(5, 5 + n)), [(6, n - 6)]) for n in (30, 22, 14, 14, 10)]


@pytest.fixture
def folders(tmp_path: Path) -> Callable[[str], str]:
    def save(architecture: str) -> str:
        folder = tmp_path / architecture
        build(architecture).save_pretrained(folder)
        return str(folder)

    return save


def taken(model: torch.nn.Module, plan: Plan, dtype: torch.dtype) -> tuple[int, int]:
    """What a pass leaves for backward, and the most that both take."""
    for p in model.parameters():
        p.grad = None
    tally = Tally()

    def forward() -> Tensor:
        with autocast(CPU, dtype):
            return planned_hidden(model, ROWS, plan)

    hidden, kept = tally.kept_by(forward)
    with tally:
        hidden.backward(torch.ones_like(hidden))
    return kept, tally.peak


# These in every way, as their layers are of different kinds; of the others each as it comes.
KINDS = ("llama", "qwen3-moe", "mistral-sliding", "bamba-hybrid")
PASSES = [
    (name, checkpointing, dtype)
    for name in ARCHITECTURES
    for checkpointing in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
    if name in KINDS or (not checkpointing and dtype == torch.float32)
]


@pytest.mark.parametrize(("name", "checkpointing", "dtype"), PASSES)
def test_a_pass_takes_what_the_real_one_does(
    name: str, checkpointing: bool, dtype: torch.dtype, folders: Callable[[str], str]
) -> None:
    real = build(name).requires_grad_(True)
    fake = Weightless(CPU).model(folders(name), torch.float32).requires_grad_(True)
    if checkpointing:
        for model in (real, fake):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
    with torch.no_grad():
        plan = find_plan(real.eval(), PREFIX)
    if checkpointing:
        real.train()
    found = taken(fake, plan, dtype)
    assert found == taken(real, plan, dtype)
    assert found[0] > 10_000
    assert nbytes(fake.parameters()) == nbytes(real.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_plan_is_the_one_that_the_run_finds(name: str, folders: Callable[[str], str]) -> None:
    with torch.no_grad():
        real = find_plan(build(name), PREFIX)
        model = Weightless(CPU).model(folders(name), torch.float32)
        with Tally():
            plan, _ = _plan(model, PREFIX)
    assert plan.mode == real.mode


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gemma2-softcap", "mistral-sliding"])
def test_no_kernel_is_launched_without_numbers(name: str, folders: Callable[[str], str]) -> None:
    """Softcaps and windows are Triton's there, whose kernel would read where nothing is."""
    model = Weightless(torch.device("cuda")).model(folders(name), torch.bfloat16)
    with torch.no_grad(), Tally():
        plan, _ = _plan(model, PREFIX)
    torch.cuda.synchronize()
    assert (plan.mode, plan.backend) == ("packed", "triton")


def test_numbers_that_are_not_there_have_no_address(folders: Callable[[str], str]) -> None:
    model = Weightless(CPU).model(folders("llama"), torch.float32)
    for tensor in (*model.parameters(), *model.buffers()):
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            tensor.data_ptr()


def test_a_tally_counts_what_is_made_and_what_is_gone() -> None:
    before = torch.ones(1000)
    with Tally() as tally:
        made = before + 1
        view = made[:10]
        twice = made * 2
        del made
        assert tally.live == 8000, "a view keeps its storage"
        del view
        assert tally.live == 4000
        twice.add_(before)
        before.mul_(2)
    assert (tally.live, tally.peak) == (4000, 8000)
    del twice
    assert tally.live == 0
