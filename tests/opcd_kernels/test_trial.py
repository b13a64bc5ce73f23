"""A backend that fails, or computes something else, is not used: the next one is, and it is said.

The kernels are Triton's, interpreted; they are broken on purpose.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from opcd_kernels import autograd, dual_triton, linear_divergence, rows_triton, trial
from opcd_kernels.backends import and_slower
from opcd_kernels.rows import Found
from tests.opcd_kernels.problems import Tensors, error, problem

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`auto` takes a kernel; what is tried is small, as the interpreter is slow."""
    monkeypatch.setattr(autograd, "chosen_backend", lambda *_: "triton_dual")
    monkeypatch.setattr(trial, "ENTRIES", 300)
    monkeypatch.setattr(trial, "WIDTH", 32)
    monkeypatch.setattr(trial, "TOKENS", 8)
    trial._FOUND.clear()
    yield
    trial._FOUND.clear()


def tensors(dtype: torch.dtype = BF16) -> Tensors:
    made = {k: v.to(dtype) for k, v in problem(n=3, v=500, d_s=16, d_t=16, noise=0.1).items()}
    made["student_hidden"].requires_grad_()
    made["student_weight"].requires_grad_()
    return made


def solved(backend: str, **more: Any) -> list[torch.Tensor]:
    t = tensors()
    out = linear_divergence(**t, backend=backend, **more)
    out.loss.backward()
    return [out.loss.detach(), t["student_hidden"].grad, t["student_weight"].grad]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The backend and the number of tokens of each computation."""
    seen = []
    for module in (autograd, trial):
        right = module.loss_and_gradients

        def computed(inputs: Any, options: Any, work: Any, *rest: Any, right: Any = right) -> Any:
            seen.append((work.backend, len(inputs.student_hidden)))
            return right(inputs, options, work, *rest)

        monkeypatch.setattr(module, "loss_and_gradients", computed)
    return seen


def test_a_backend_that_agrees_is_tried_once(used: list, caplog: pytest.LogCaptureFixture) -> None:
    first, second = solved("auto"), solved("auto")
    assert used == [("torch", 8), ("triton_dual", 8), ("triton_dual", 3), ("triton_dual", 3)]
    assert not caplog.records
    for a, b, c in zip(first, second, solved("torch"), strict=True):
        assert torch.equal(a, b)
        assert error(a, c) < 0.005
    used.clear()
    solved("auto", divergence="jsd")
    assert used == [("torch", 8), ("triton_dual", 8), ("triton_dual", 3)], "another option"


def test_a_named_backend_is_not_tried(used: list) -> None:
    solved("triton_dual")
    assert used == [("triton_dual", 3)]


@pytest.mark.parametrize(
    "refusal", [OutOfResources(180312, 101376, "shared memory"), RuntimeError("no kernel image")]
)
def test_a_launch_that_fails_takes_the_next_backend(
    refusal: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    used: list,
) -> None:  # fmt: skip
    def product(*_: Any) -> None:
        raise refusal

    monkeypatch.setattr(dual_triton.DualProduct, "product", product)
    for _ in range(2):
        found = solved("auto")
    assert [x for x in used if x[1] == 3] == [("triton", 3)] * 2
    (record,) = caplog.records
    assert f"the loss does not use triton_dual on cpu: {type(refusal).__name__}: " in (
        record.getMessage()
    )
    for a, b in zip(found, solved("torch"), strict=True):
        assert error(a, b) < 0.005


@pytest.mark.parametrize("what", ["gradient", "nan", "value"])
def test_a_kernel_that_differs_leaves_the_call_to_torch(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, used: list
) -> None:
    """And the one behind it too."""
    right, product = rows_triton.divergence_rows_, dual_triton.DualProduct.product

    def rows(*arguments: Any) -> None:
        right(*arguments)
        (found,) = (x for x in arguments if isinstance(x, Found))
        if what == "value":
            found.per_token.mul_(1.02)
        elif what == "gradient":
            found.dz.mul_(1.02)
        else:
            found.dz[0].fill_(torch.nan)

    monkeypatch.setattr(rows_triton, "divergence_rows_", rows)
    monkeypatch.setattr(dual_triton.DualProduct, "product", lambda *a: product(*a).mul_(1.1))
    found = solved("auto")
    assert used[-1] == ("torch", 3)
    first, second = (record.getMessage() for record in caplog.records)
    assert "triton_dual on cpu: on 8 tokens it differs from torch (loss by " in first
    assert "use triton on cpu: on 8 tokens it differs from torch (loss by " in second
    assert {"gradient": "hidden gradient by 0.02", "nan": "weight gradient by nan"}.get(
        what, "divergences by 0.02"
    ) in second
    for a, b in zip(found, solved("torch"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "more",
    [
        {"target_ids": torch.tensor([1, 2, -100]), "token_weights": torch.tensor([1.0, 0.5, 0.0])},
        {"student_softcap": 5.0, "teacher_bias": torch.linspace(-1, 1, 500)},
        {"forward_share": torch.tensor([0.0, 0.3, 1.0])},
        {"target_ids": torch.tensor([1, 2, 3]), "logprob_weights": torch.ones(3)},
        {"vocab_size": 490, "divergence": "forward_kl"},
    ],
    ids=lambda x: " ".join(x),
)
def test_everything_that_a_call_may_have_is_tried(
    more: dict, monkeypatch: pytest.MonkeyPatch, used: list, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(autograd, "chosen_backend", lambda *_: "triton")
    solved("auto", **more)
    assert used == [("torch", 8), ("triton", 8), ("triton", used[-1][1])]
    assert not caplog.records


def test_it_costs_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch, used: list) -> None:
    monkeypatch.undo()
    trial._FOUND.clear()
    solved("auto")
    assert not trial._FOUND


def test_memory_that_runs_out_says_nothing_of_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dual_triton.DualProduct, "product", full)
    with pytest.raises(torch.OutOfMemoryError):
        solved("auto")
    assert not trial._FOUND


def test_the_order_ends_with_torch() -> None:
    assert and_slower("triton_dual") == ("triton_dual", "triton", "torch")
    assert and_slower("triton") == ("triton", "torch")
    assert and_slower("torch") == ("torch",)
