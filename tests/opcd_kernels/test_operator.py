"""The operator behind the loss: its work, its backward, torch.compile, its errors."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from opcd_kernels import linear_divergence
from opcd_kernels.chunks import Gradients, Inputs, Work, loss_and_gradients
from opcd_kernels.options import Options
from tests.opcd_kernels.problems import error, oracle, problem


class Operations(TorchDispatchMode):
    """Counts operations by name, and the elements of the largest tensor that any returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        name = func._schema.name.split("::")[1]
        self.counts[name] = self.counts.get(name, 0) + 1
        return result

    @property
    def products(self) -> int:
        return sum(self.counts.get(name, 0) for name in ("mm", "addmm", "addmm_"))


def operations(need: Gradients, n: int, v: int, chunk_tokens: int, **more: Any) -> Operations:
    """What one call does, seen below the operator that hides it."""
    t = {k: x.bfloat16() for k, x in problem(n=n, v=v).items()}
    rest = {"student_bias": None, "teacher_bias": None, "token_weights": torch.full((n,), 1 / n)}
    rest |= dict.fromkeys(("forward_shares", "target_ids", "logprob_weights"))
    inputs = Inputs(**t | rest | more)
    options = Options("reverse_kl", 0.5, 1.0, None, None, v)
    with Operations() as seen:
        loss_and_gradients(inputs, options, Work(chunk_tokens, torch.bfloat16, "torch", need))
    return seen


@pytest.mark.parametrize(
    ("need", "products"),
    [
        (Gradients(True, True, False), 4),
        (Gradients(True, False, False), 3),
        (Gradients(False, True, True), 3),
        (Gradients(False, False, False), 2),
    ],
)
def test_products_a_chunk(need: Gradients, products: int) -> None:
    assert operations(need, n=12, v=51, chunk_tokens=4).products == 3 * products


def test_full_logits_never_exist() -> None:
    seen = operations(Gradients(True, True, True), n=256, v=997, chunk_tokens=16)
    assert 0 < seen.largest <= 4 * 16 * 997


def test_dropped_tokens_are_not_computed() -> None:
    weights = torch.zeros(64)
    weights[::16] = 1
    need = Gradients(False, False, False)
    seen = operations(need, n=64, v=51, chunk_tokens=4, token_weights=weights)
    assert seen.products == 2


@pytest.mark.parametrize("shares", [None, torch.full((12,), 0.5)])
def test_without_a_divergence_there_is_no_product_with_the_teacher(shares: Tensor | None) -> None:
    targets = {"target_ids": torch.arange(12), "logprob_weights": torch.ones(12)}
    more = targets | {"token_weights": torch.zeros(12), "forward_shares": shares}
    assert operations(Gradients(True, True, False), 12, 51, 4, **more).products == 3 * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_upstream_gradient_scales_and_backward_twice_agrees(dtype: torch.dtype) -> None:
    t = {k: v.to(dtype) for k, v in problem().items()}
    w = t["student_weight"].clone().requires_grad_()
    loss = linear_divergence(**t | {"student_weight": w}).loss
    (once,) = torch.autograd.grad(loss, w, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * -4, w, retain_graph=True)
    (again,) = torch.autograd.grad(loss, w)
    assert torch.equal(once, again)
    assert torch.equal(scaled, -4 * once)


TRANSFORMS = {
    "vmap": lambda f, h: torch.vmap(f)(torch.stack([h, h])),
    "grad": lambda f, h: torch.func.grad(f)(h),
    "jvp": lambda f, h: torch.func.jvp(f, (h,), (h,)),
    "jacfwd": lambda f, h: torch.func.jacfwd(f)(h),
    "hessian": lambda f, h: torch.func.hessian(f)(h),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["student_hidden", "teacher_weight", "token_weights"])
def test_transforms_of_functions_are_refused(transform: str, name: str) -> None:
    t = problem() | {"token_weights": torch.ones(7, dtype=torch.float64)}
    with pytest.raises(RuntimeError, match=r"outside torch.func's transforms.*autograd.grad"):
        TRANSFORMS[transform](lambda x: linear_divergence(**t | {name: x}).loss, t[name])


def test_forward_mode_is_refused() -> None:
    t = problem()
    with forward_ad.dual_level():
        t["student_hidden"] = forward_ad.make_dual(t["student_hidden"], t["student_hidden"])
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            linear_divergence(**t)


@pytest.mark.parametrize("trained", [(), ("student_hidden",), ("student_hidden", "student_weight")])
def test_its_operations_are_counted(trained: tuple[str, ...]) -> None:
    t = problem(n=7, v=51, d_s=8, d_t=12)
    for name in trained:
        t[name].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear_divergence(**t)
    assert counter.get_total_flops() == 2 * 7 * 51 * (8 * (1 + len(trained)) + 12)


def test_numbers_of_numpy_are_numbers() -> None:
    t = problem()
    options = {
        "temperature": np.float32(2),
        "vocab_size": np.int64(40),
        "chunk_tokens": np.int32(3),
    }
    plain = linear_divergence(**t, temperature=2.0, vocab_size=40, chunk_tokens=3)
    assert torch.equal(linear_divergence(**t, **options).loss, plain.loss)


def test_second_derivatives_raise() -> None:
    t = problem()
    h = t["student_hidden"].requires_grad_()
    loss = linear_divergence(**t).loss
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_transposed_token_weights_are_refused() -> None:
    t = {k: v.view(2, 6, -1) if k.endswith("hidden") else v for k, v in problem(n=12).items()}
    with pytest.raises(ValueError, match=r"shape \(2, 6\) or \(12,\), got \(6, 2\)"):
        linear_divergence(**t, token_weights=torch.ones(6, 2))


def test_threads_leave_the_precision_of_other_products_alone() -> None:
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(setting, "fp32_precision", None)
    t = {k: v.bfloat16() for k, v in problem(n=32, v=500).items()}

    def work(_: int) -> float:
        return sum(linear_divergence(**t).loss.item() for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        results = set(pool.map(work, range(4)))
    assert len(results) == 1
    assert getattr(setting, "fp32_precision", None) == before


def test_the_largest_token_weights_keep_gradients_finite() -> None:
    t = {k: v.float() for k, v in problem().items()}
    w = t["student_weight"].requires_grad_()
    linear_divergence(**t, token_weights=torch.full((7,), 3e38) * 1e-3).loss.backward()
    large = w.grad.clone()
    w.grad = None
    linear_divergence(**t, token_weights=torch.ones(7)).loss.backward()
    assert error(large / 3e35, w.grad) < 1e-5
    w.grad = None
    weights = torch.full((7,), 3e38)
    linear_divergence(**t, token_weights=weights).loss.mul(1e-30).backward()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torch_compile_does_not_recompile_for_every_number_of_tokens(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opcd_kernels.autograd._SCALED_BYTES", 2 * 4 * 8)  # of two tokens
    t = {name: x.to(dtype) for name, x in problem(n=12).items()}
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(backend=counter, fullgraph=True)
    def step(h: Tensor, w: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
        return linear_divergence(h, w, h_t, w_t).loss

    h, w = t["student_hidden"].requires_grad_(), t["student_weight"].requires_grad_()
    for n in range(3, 12):
        loss = step(h[:n], w, t["teacher_hidden"][:n], t["teacher_weight"])
        loss.backward()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_sees_one_operation(dynamic: bool) -> None:
    t = problem(n=12)
    expected = oracle(t)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list) -> Any:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example)

    @torch.compile(backend=backend, fullgraph=True, dynamic=dynamic)
    def step(h: Tensor, w: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.nn.functional.silu(h) * 1.0
        out = linear_divergence(h, w, t["teacher_hidden"], t["teacher_weight"], weights)
        return out.loss * 2, out.per_token

    inner = t["student_hidden"].clone().requires_grad_()
    w = t["student_weight"].clone().requires_grad_()
    loss, per_token = step(inner, w, torch.full((12,), 1 / 12, dtype=torch.float64))
    loss.backward()
    plain = t | {"student_hidden": torch.nn.functional.silu(t["student_hidden"])}
    expected = oracle(plain)
    assert error(loss / 2, expected.loss) < 1e-12
    assert error(per_token, expected.per_token) < 1e-12
    assert w.grad is not None
    assert inner.grad is not None
    assert error(w.grad / 2, expected.grad_weight) < 1e-12
    assert (
        error(
            inner.grad,
            torch.autograd.grad(torch.nn.functional.silu(inner), inner, 2 * expected.grad_hidden)[
                0
            ],
        )
        < 1e-12
    )
    targets = [str(node.target) for node in graphs[-1].graph.nodes]
    assert sum("linear_divergence" in target for target in targets) == 1


@pytest.mark.parametrize("more", [False, True])
def test_torch_library_accepts_the_operator(more: bool) -> None:
    t = {k: v.float() for k, v in problem(n=4).items()}
    operator = torch.ops.opcd_kernels.linear_divergence.default
    of_tokens = (
        (torch.full((4,), 0.5), torch.tensor([0, 50, 7, 7]), torch.linspace(-1, 1, 4))
        if more
        else (None, None, None)
    )
    arguments = (
        *(t["student_hidden"].requires_grad_(), t["student_weight"].requires_grad_(), None),
        *(t["teacher_hidden"], t["teacher_weight"], None, torch.full((4,), 0.25), *of_tokens),
        *("mixture" if more else "reverse_kl", 0.5, 1.0, None, None, 51),
        *(2, torch.float32, "torch", [True, True, False]),
    )
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_hidden": torch.ones(6, 12)}, "same tokens"),
        ({"teacher_hidden": torch.ones(7, 12).double()}, "both be fp64 or neither"),
        ({"student_weight": torch.ones(8, 51)}, "untransposed"),
        ({"student_weight": torch.ones(0)}, "whole lm_head weight"),
        ({"student_weight": torch.ones(51, 8).double()}, "both be fp64 or neither"),
        ({"student_weight": torch.ones(51, 8, dtype=torch.float8_e4m3fn)}, "dequantize"),
        ({"student_weight": torch.ones(0, 8), "teacher_weight": torch.ones(0, 12)}, "one row"),
        ({"student_weight": [[1.0]]}, "student_weight must be a tensor, got list"),
        ({"teacher_weight": torch.ones(60, 12)}, "vocab_size=51"),
        ({"vocab_size": 52}, "between 1 and 51"),
        ({"vocab_size": 20.0}, "must be an integer"),
        ({"token_weights": torch.ones(6)}, "7 tokens"),
        ({"token_weights": [1.0] * 7}, "token_weights must be a tensor"),
        ({"divergence": "kl"}, "reverse_kl, forward_kl, jsd"),
        ({"divergence": "jsd", "beta": 1.0}, "strictly between"),
        ({"temperature": 0.0}, "temperature must be a positive finite number"),
        ({"temperature": None}, "temperature must be a positive finite number"),
        ({"temperature": "1"}, "temperature must be a positive finite number, got '1'"),
        ({"token_weights": torch.ones(7) * 1j}, "must be a tensor of real numbers, got torch.comp"),
        ({"temperature": torch.ones(())}, "temperature must be a positive finite number"),
        ({"student_softcap": -1.0}, "student_softcap must be a positive finite number"),
        ({"teacher_softcap": float("inf")}, "teacher_softcap must be a positive finite number"),
        ({"student_bias": torch.ones(3)}, "student_bias must be"),
        ({"backend": "fast"}, "backend must be"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a positive integer"),
        ({"chunk_tokens": 2.0}, "chunk_tokens must be a positive integer"),
        ({"student_hidden": torch.ones(7, 8, dtype=torch.int8)}, "floating point"),
        ({"teacher_hidden": torch.ones(7, 12, device="meta")}, "one device"),
        (
            {
                "teacher_hidden": torch.ones(7, 12, device="meta"),
                "teacher_weight": torch.ones(51, 12, device="meta"),
            },
            "student and teacher must be on one device",
        ),
        ({"teacher_bias": torch.ones(51, device="meta")}, "one device"),
        ({"token_weights": torch.ones(7, device="meta")}, "or on the CPU"),
        ({"forward_share": 1.5}, r"forward_share must be a number between 0 and 1.*got 1\.5"),
        ({"forward_share": float("nan")}, "forward_share must be a number between 0 and 1"),
        ({"forward_share": "0.5"}, "forward_share must be a number between 0 and 1"),
        ({"forward_share": torch.full((7,), -0.1)}, r"between 0 and 1, got -0\.1"),
        ({"forward_share": torch.full((7,), torch.nan)}, "between 0 and 1, got nan"),
        ({"forward_share": torch.zeros(6)}, "one number for each of the 7 tokens"),
        ({"forward_share": 0.5, "divergence": "jsd"}, "must be 0 with divergence='jsd'"),
        ({"forward_share": 1.0, "divergence": "forward_kl"}, "must be 0 with divergence='forward"),
        ({"forward_share": torch.zeros(7), "divergence": "jsd"}, "must be 0 with divergence='jsd'"),
        ({"target_ids": torch.zeros(7)}, r"target_ids must be int64.*target_ids\.long\(\)"),
        ({"target_ids": [0] * 7}, "target_ids must be a tensor"),
        ({"target_ids": torch.full((7,), 51)}, "target_ids must lie between 0 and 50, got 51"),
        ({"target_ids": torch.full((7,), 40), "vocab_size": 40}, "between 0 and 39, got 40"),
        ({"target_ids": torch.full((7,), -100)}, "got -100 in a token that counts"),
        ({"logprob_weights": torch.ones(7)}, "logprob_weights must come with target_ids"),
        (
            {"target_ids": torch.zeros(7).long(), "logprob_weights": torch.ones(5)},
            "logprob_weights must hold one number for each of the 7 tokens",
        ),
        ({"backend": "triton", **{k: v.double() for k, v in problem().items()}}, "on a GPU"),
    ],
)
def test_arguments_that_do_not_fit(change: dict, message: str) -> None:
    tensors = {k: v.float() for k, v in problem().items()}
    with pytest.raises(ValueError, match=message):
        linear_divergence(**tensors | change)
