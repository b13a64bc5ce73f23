"""The head's gradient added to `.grad` in the forward pass: equal, nowhere else, or refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from opcd_kernels import linear_divergence
from tests.opcd_kernels.problems import WHERE, Where, error, problem

everywhere = pytest.mark.parametrize("where", WHERE)
V, D = 51, 8


def tensors(n: int = 7, v: int = V, d: int = D, device: str = "cpu") -> dict[str, Any]:
    """In fp32, the student's head a parameter."""
    t = {k: x.to(device, torch.float32) for k, x in problem(n=n, v=v, d_s=d).items()}
    return t | {"student_weight": nn.Parameter(t["student_weight"])}


def added(**change: Any) -> Tensor:
    """The loss of a call with the flag."""
    return linear_divergence(**tensors() | change, add_weight_grad=True).loss


@everywhere
@pytest.mark.parametrize("autocast", [False, True])
def test_accumulated_gradients_equal_those_of_the_ordinary_path(
    autocast: bool, where: Where
) -> None:
    """Two calls on a head that is the embedding too, with chunks, bias, dropped tokens, fewer V."""
    t = tensors(n=12, device=where.device)
    embedding = t.pop("student_weight")
    bias = nn.Parameter(torch.linspace(-1, 1, V, device=where.device))
    mix = t.pop("student_hidden")
    weights = torch.linspace(0, 1, 12)

    def gradients(add_weight_grad: bool) -> list[Tensor]:
        embedding.grad = bias.grad = None
        for rows in (slice(0, 5), slice(5, 12)):
            hidden = embedding[rows] * mix[rows]  # the embedding of tokens that stand in front
            with torch.autocast(where.device, torch.bfloat16, enabled=autocast):
                out = linear_divergence(
                    hidden,
                    embedding,
                    t["teacher_hidden"][rows],
                    t["teacher_weight"],
                    weights[rows],
                    student_bias=bias,
                    vocab_size=V - 4,
                    chunk_tokens=3,
                    backend=where.backend,
                    add_weight_grad=add_weight_grad,
                )
            out.loss.backward()
        return [embedding.grad, bias.grad]

    for a, e in zip(gradients(True), gradients(False), strict=True):
        assert error(a, e) < 1e-6


@everywhere
def test_a_gradient_that_is_there_already_is_added_to(where: Where) -> None:
    t = tensors(device=where.device)
    weight = t["student_weight"]
    linear_divergence(**t, backend=where.backend).loss.backward()
    expected, weight.grad = weight.grad + 1, torch.ones_like(weight)
    before = weight.grad
    linear_divergence(**t, backend=where.backend, add_weight_grad=True).loss.backward()
    assert weight.grad is before
    assert error(weight.grad, expected) < 1e-6


class Allocations(TorchDispatchMode):
    """The bytes of the largest memory that any operation made."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def test_nothing_of_the_heads_size_is_allocated() -> None:
    t = tensors(n=9, v=500, d=64)
    weight = t["student_weight"]
    weight.grad = torch.zeros_like(weight)
    largest = []
    for add_weight_grad in (True, False):
        with Allocations(weight.grad, *t.values()) as seen:
            t["student_hidden"].requires_grad_()
            out = linear_divergence(**t, chunk_tokens=3, add_weight_grad=add_weight_grad)
            out.loss.backward()
        largest.append(seen.largest)
    # The other path allocates it inside the operator, unseen, and hands it out.
    assert 0 < largest[0] < weight.nbytes <= largest[1]


def test_without_gradients_it_has_no_effect() -> None:
    t = tensors()
    with torch.no_grad():
        with_it = linear_divergence(**t, add_weight_grad=True)
        without = linear_divergence(**t)
    assert torch.equal(with_it.per_token, without.per_token)
    assert t["student_weight"].grad is None


def test_no_tokens_leave_a_gradient_of_zero() -> None:
    t = tensors(n=0)
    linear_divergence(**t, add_weight_grad=True).loss.backward()
    assert (t["student_weight"].grad == 0).all()


def test_a_hook_that_was_removed_is_none() -> None:
    t = tensors()
    t["student_weight"].register_hook(lambda grad: grad).remove()
    t["student_weight"].register_post_accumulate_grad_hook(lambda _: None).remove()
    linear_divergence(**t, add_weight_grad=True).loss.backward()
    assert t["student_weight"].grad.abs().sum() > 0


def hooked(weight: nn.Parameter) -> nn.Parameter:
    weight.register_hook(lambda grad: grad)
    return weight


def post_hooked(weight: nn.Parameter) -> nn.Parameter:
    weight.register_post_accumulate_grad_hook(lambda _: None)
    return weight


def with_sparse_grad(weight: nn.Parameter) -> nn.Parameter:
    weight.grad = torch.zeros_like(weight).to_sparse()
    return weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w * 1, "a leaf that requires a gradient, got the result of an operation"),
        (lambda w: w.detach(), "a leaf that requires a gradient, got one without a gradient"),
        (lambda w: nn.Parameter(w.detach().bfloat16()), "must be in fp32, got torch.bfloat16"),
        (hooked, "must have no hooks"),
        (post_hooked, "must have no hooks"),
        (with_sparse_grad, "must be dense and in fp32, got torch.sparse_coo"),
    ],
)
def test_heads_that_are_refused(change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        added(student_weight=change(tensors()["student_weight"]))


def test_fp16_is_refused() -> None:
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="must not be in fp16"),
    ):
        added()


def test_torch_compile_is_refused() -> None:
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def step(t: dict) -> Tensor:
        return linear_divergence(**t, add_weight_grad=True).loss

    t = tensors()
    with pytest.raises(Exception, match="must not be compiled"):
        step(t)
    assert t["student_weight"].grad is None


def test_activation_checkpointing_is_refused() -> None:
    """It would add the gradient a second time when backward repeats the call."""
    t = tensors()
    t["student_hidden"].requires_grad_()

    def loss(hidden: Tensor) -> Tensor:
        return linear_divergence(**t | {"student_hidden": hidden}, add_weight_grad=True).loss

    found = checkpoint(loss, t["student_hidden"].tanh(), use_reentrant=False)
    with pytest.raises(ValueError, match="must not be repeated, got one inside a backward pass"):
        found.backward()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def two_processes() -> Iterator[None]:
    """As far as this one can tell."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class Student(nn.Module):
    def __init__(self, t: dict[str, Any]) -> None:
        super().__init__()
        self.weight, self.others = t.pop("student_weight"), t

    def forward(self) -> Tensor:
        return linear_divergence(
            student_weight=self.weight, **self.others, add_weight_grad=True
        ).loss


@pytest.mark.usefixtures("one_process")
def test_data_parallel_is_refused_even_alone() -> None:
    student = Student(tensors())
    with pytest.raises(ValueError, match="no DistributedDataParallel"):
        DistributedDataParallel(student)()
    student().backward()
    assert student.weight.grad is not None


@pytest.mark.usefixtures("one_process")
def test_a_sharded_head_is_refused() -> None:
    mesh = init_device_mesh("cpu", (1,))
    weight = distribute_tensor(tensors()["student_weight"], mesh, [Replicate()])
    with pytest.raises(ValueError, match="must be a plain parameter, got a DTensor"):
        added(student_weight=weight)


@pytest.mark.usefixtures("two_processes")
def test_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one process.*got 2"):
        added()


def test_a_scaled_loss_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="must be unscaled"):
        (added() / 2).backward()


def test_a_second_backward_is_noticed() -> None:
    loss = added()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward, got a second"):
        loss.backward()


def test_zero_grad_before_backward_is_noticed() -> None:
    t = tensors()
    loss = linear_divergence(**t, add_weight_grad=True).loss
    torch.optim.SGD([t["student_weight"]], lr=1).zero_grad()
    with pytest.raises(RuntimeError, match="call zero_grad before the forward pass"):
        loss.backward()
