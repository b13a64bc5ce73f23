"""Both KL in shares of a token, and log-probabilities of target ids, beside the divergence."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from opcd_kernels import linear_divergence, reference
from tests.opcd_kernels.problems import (
    DIVERGENCES,
    OF_TOKENS,
    WHERE,
    Tensors,
    Where,
    assert_as_exact_as_plain,
    error,
    oracle,
    ours,
    problem,
    rounded,
)

everywhere = pytest.mark.parametrize("where", WHERE)
# −inf − −inf is computed, and then not selected.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN on the CPU, so that an output nobody wrote is noticed."""
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


def mixture(n: int = 7, v: int = 51, **more: Any) -> Tensors:
    """A problem with a share, a target and a logprob weight a token."""
    generator = torch.Generator().manual_seed(2)
    return problem(n=n, v=v, **more) | {
        "token_weights": torch.rand(n, generator=generator).double(),
        "forward_share": torch.rand(n, generator=generator).double(),
        "target_ids": torch.randint(v, (n,), generator=generator),
        "logprob_weights": torch.randn(n, generator=generator).double(),
    }


def only(tensors: Tensors, *names: str) -> Tensors:
    """Of what is said of tokens, that alone."""
    return {k: v for k, v in tensors.items() if k not in OF_TOKENS or k in names}


def outputs(tensors: Tensors, dtype: torch.dtype, where: Where, **options: Any) -> Any:
    t = {k: v if k in OF_TOKENS else v.to(where.device, dtype) for k, v in tensors.items()}
    return linear_divergence(**t, backend=where.backend, **options)


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("share", [0.3, "tensor"])
def test_equals_the_definition_in_fp64(share: float | str, chunk_tokens: int | None) -> None:
    t, options = mixture(), {}
    if share != "tensor":
        del t["forward_share"]
        options["forward_share"] = share
    expected, actual = oracle(t, **options), ours(t, chunk_tokens=chunk_tokens, **options)
    for a, e in zip(actual, expected, strict=True):
        assert error(a, e) < 1e-11


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_targets_beside_every_divergence_in_fp64(divergence: str) -> None:
    t = only(mixture(), "token_weights", "target_ids", "logprob_weights")
    options = {"divergence": divergence, "temperature": 0.6, "student_softcap": 3.0}
    for a, e in zip(ours(t, **options), oracle(t, **options), strict=True):
        assert error(a, e) < 1e-11


def test_finite_differences() -> None:
    t = mixture(n=3, v=9, d_s=4)
    rest = {k: v for k, v in t.items() if not k.startswith("student")}

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_divergence(
            h, w, rest["teacher_hidden"], rest["teacher_weight"],
            **{k: rest[k] for k in OF_TOKENS}, student_softcap=5.0, temperature=0.7,
        ).loss  # fmt: skip

    h, w = (t[k].requires_grad_() for k in ("student_hidden", "student_weight"))
    assert torch.autograd.gradcheck(loss, (h, w))


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_option_together(dtype: torch.dtype, where: Where) -> None:
    v = 1500  # more than one block of the kernel
    t = mixture(n=3, v=v)
    bias = torch.randn(v, generator=torch.Generator().manual_seed(1)).double()
    t |= {"student_bias": bias, "teacher_bias": bias.flip(0)}
    t["target_ids"] %= v - 11
    options = {
        "temperature": 0.6,
        "student_softcap": 3.0,
        "teacher_softcap": 4.0,
        "vocab_size": v - 11,
        "chunk_tokens": 2,
    }
    assert_as_exact_as_plain(t, dtype, where, **options)


@everywhere
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
def test_bf16_keeps_its_digits(noise: float, where: Where) -> None:
    t = mixture(n=16, v=500, d_s=64, d_t=64, noise=noise)
    t = rounded(only(t, "forward_share"), torch.bfloat16)
    actual = assert_as_exact_as_plain(t, torch.bfloat16, where)
    expected = oracle(t)
    assert error(actual.grad_hidden, expected.grad_hidden) < 0.005
    assert error(actual.grad_weight, expected.grad_weight) < 0.005
    out = outputs(t, torch.bfloat16, where)
    for kind in ("reverse_kl", "forward_kl"):
        exact = oracle(only(t), divergence=kind).per_token
        found = getattr(out, kind).cpu().double()
        assert ((found - exact).abs() <= 0.01 * exact).all()
        assert (found >= 0).all()


@everywhere
def test_nearly_equal_models_keep_their_digits(where: Where) -> None:
    t = mixture(n=8, v=1500, d_s=32, d_t=32, noise=1e-4)
    t = rounded(only(t, "forward_share"), torch.float32)
    out = outputs(t, torch.float32, where)
    for kind in ("reverse_kl", "forward_kl"):
        expected = oracle(only(t), divergence=kind).per_token
        assert expected.mean() < 1e-5
        assert error(getattr(out, kind), expected) < 0.01


@everywhere
@pytest.mark.parametrize("scale", [5, 20])
def test_peaked_tokens_and_models_far_apart(scale: float, where: Where) -> None:
    t = mixture(d_t=8, v=200)
    t["teacher_weight"] = -scale * t["student_weight"]
    t["teacher_hidden"] = t["student_hidden"] + 0.1
    t["student_weight"] = scale * t["student_weight"]
    t = rounded(only(t, "forward_share"), torch.float32)
    actual = assert_as_exact_as_plain(t, torch.float32, where)
    assert error(actual.per_token, oracle(t).per_token) < 1e-5
    out = outputs(t, torch.float32, where)
    for kind in ("reverse_kl", "forward_kl"):
        expected = oracle(only(t), divergence=kind).per_token
        assert ((getattr(out, kind).cpu() - expected).abs() <= 1e-4 * expected).all()


@everywhere
def test_a_peaked_teacher_close_to_a_peaked_student(where: Where) -> None:
    t = problem(n=24, v=300, d_s=16, d_t=16, seed=1) | {"forward_share": torch.full((24,), 0.5)}
    t = rounded(t | {k: 20 * t[k] for k in ("student_weight", "teacher_weight")}, torch.float32)
    out = outputs(t, torch.float32, where)
    for kind in ("reverse_kl", "forward_kl"):
        expected = oracle(only(t), divergence=kind).per_token
        counted = expected > 1e-4
        assert counted.any()
        difference = (getattr(out, kind).cpu() - expected).abs()
        assert (difference[counted] <= 1e-3 * expected[counted]).all()


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("share", "divergence"), [(0, "reverse_kl"), (1, "forward_kl")])
def test_shares_of_0_and_1_are_the_kl_themselves(
    share: int, divergence: str, dtype: torch.dtype, where: Where
) -> None:
    t = problem(n=9, v=1100)
    pure = ours(t, dtype, where, divergence=divergence)
    for a, e in zip(ours(t, dtype, where, forward_share=float(share)), pure, strict=True):
        assert torch.equal(a, e)
    found = ours(t | {"forward_share": torch.full((9,), float(share))}, dtype, where)
    exact = where.backend == "triton" or where.device != "cpu" or share == 0
    for a, e in zip(found, pure, strict=True):
        assert torch.equal(a, e) if exact else error(a, e) < (1e-6, 0.004)[dtype != torch.float32]


@everywhere
def test_what_was_not_computed_is_none(where: Where) -> None:
    t = only(mixture())
    reverse = outputs(t, torch.float32, where)
    forward = outputs(t, torch.float32, where, divergence="forward_kl")
    jsd = outputs(t, torch.float32, where, divergence="jsd")
    both = outputs(t, torch.float32, where, forward_share=0.25)
    assert torch.equal(reverse.reverse_kl, reverse.per_token)
    assert torch.equal(forward.forward_kl, forward.per_token)
    assert reverse.forward_kl is forward.reverse_kl is jsd.reverse_kl is jsd.forward_kl is None
    assert reverse.logprobs is None
    assert error(both.reverse_kl, reverse.per_token) < 1e-6
    assert error(both.forward_kl, forward.per_token) < 1e-6
    assert error(both.per_token, 0.75 * both.reverse_kl + 0.25 * both.forward_kl) < 1e-6


@everywhere
def test_an_entry_that_the_teacher_holds_impossible(where: Where) -> None:
    """Reverse KL infinite, forward KL not: what has no share of the reverse KL stays finite."""
    t = {k: v.to(where.device, torch.float32) for k, v in problem(n=4, v=1100).items()}
    t["student_hidden"].requires_grad_()
    impossible = torch.zeros(1100, device=where.device)
    impossible[1000] = -torch.inf
    found, grads = [], []
    for option in ({"divergence": "forward_kl"}, {"forward_share": torch.tensor([1, 1, 1, 0.5])}):
        t["student_hidden"].grad = None
        out = linear_divergence(**t, **option, teacher_bias=impossible, backend=where.backend)
        out.loss.backward()
        found.append(out)
        grads.append(t["student_hidden"].grad)
    assert (found[1].reverse_kl == torch.inf).all()
    assert torch.equal(found[1].forward_kl, found[0].per_token)
    assert torch.equal(found[1].per_token[:3], found[0].per_token[:3])
    assert found[1].per_token[3] == torch.inf
    assert torch.equal(grads[1][:3], grads[0][:3])


@everywhere
def test_an_entry_that_the_student_holds_impossible(where: Where) -> None:
    t = {k: v.to(where.device, torch.float32) for k, v in problem(n=3, v=1100).items()}
    impossible = torch.zeros(1100, device=where.device)
    impossible[1000] = -torch.inf
    shares, targets = torch.tensor([0, 0.5, 1]), torch.tensor([1000, 1000, 7])
    out = linear_divergence(
        **t,
        forward_share=shares,
        target_ids=targets,
        student_bias=impossible,
        backend=where.backend,
    )
    assert (out.forward_kl == torch.inf).all()
    assert out.reverse_kl.isfinite().all()
    assert out.per_token[0] == out.reverse_kl[0]
    assert (out.per_token[1:] == torch.inf).all()
    assert (out.logprobs[:2] == -torch.inf).all()
    assert out.logprobs[2].isfinite()


@everywhere
@pytest.mark.parametrize("divergence", [*DIVERGENCES, "mixture"])
def test_tokens_without_a_divergence_but_with_a_target(divergence: str, where: Where) -> None:
    """Of the others, the teacher's state may be anything; of the dropped, everything."""
    t = rounded(mixture(n=5), torch.float32)
    option = {"forward_share": 0.5} if divergence == "mixture" else {"divergence": divergence}
    t["token_weights"] = torch.tensor([0.5, 0, 0, 0.25, 0])
    t["logprob_weights"] = torch.tensor([-1.0, 2, 0, 0, 0.5])
    t["target_ids"][2] = -100
    t = only(t, "token_weights", "logprob_weights", "target_ids")
    clean = t | {"target_ids": t["target_ids"].clamp(0)}
    expected = oracle(clean, **option)
    t["teacher_hidden"] = t["teacher_hidden"].clone()
    t["teacher_hidden"][[1, 2]] = torch.nan
    t["teacher_hidden"][4] *= 1e30
    t["student_hidden"] = t["student_hidden"].clone()
    t["student_hidden"][2] = torch.inf
    counts = torch.tensor([True, True, False, True, True])
    z = reference.logits(clean["student_hidden"], clean["student_weight"])
    for device in {"cpu", where.device}:
        moved = {k: v.to(device) if k in OF_TOKENS else v for k, v in t.items()}
        actual = ours(moved, torch.float32, where, **option)
        assert error(actual.loss, expected.loss) < 1e-5
        assert error(actual.grad_hidden[counts], expected.grad_hidden[counts]) < 1e-5
        assert (actual.grad_hidden[2] == 0).all()
        assert error(actual.grad_weight, expected.grad_weight) < 1e-5
        weighted = t["token_weights"] != 0
        assert error(actual.per_token[weighted], expected.per_token[weighted]) < 1e-5
        assert (actual.per_token[~weighted] == 0).all()
        out = outputs(moved, torch.float32, where, **option)
        logprobs = reference.logprobs(z, clean["target_ids"])
        assert error(out.logprobs[counts], logprobs[counts]) < 1e-5
        assert error(out.student_entropy[counts], reference.entropy(z)[counts]) < 1e-5
        assert out.logprobs[2] == out.student_entropy[2] == 0


@everywhere
def test_numbers_of_tokens_lie_in_memory_as_they_like(where: Where) -> None:
    """Expanded ones, columns, and what a dropped token has in place of a share."""
    t = rounded(mixture(), torch.float32)
    t |= {"forward_share": torch.full((7,), 0.3), "token_weights": torch.full((7,), 1 / 7)}
    expected = ours(t, torch.float32, where)
    columns = torch.stack([t["target_ids"], t["target_ids"].flip(0)], 1)
    dropped = t["token_weights"].clone(), t["logprob_weights"].clone(), t["forward_share"].clone()
    for x, value in zip(dropped, (0, 0, torch.nan), strict=True):
        x[2] = value
    blind = dict(zip(("token_weights", "logprob_weights", "forward_share"), dropped, strict=True))
    fewer = ours(t | blind | {"forward_share": t["forward_share"]}, torch.float32, where)
    for device in {"cpu", where.device}:
        laid = {
            "forward_share": torch.tensor(0.3, device=device).expand(7),
            "token_weights": torch.tensor(1 / 7, device=device).expand(7),
            "target_ids": columns.to(device)[:, 0],
        }
        for a, e in zip(ours(t | laid, torch.float32, where), expected, strict=True):
            assert torch.equal(a, e)
        moved = {k: v.to(device) if k in OF_TOKENS else v for k, v in (t | blind).items()}
        for a, e in zip(ours(moved, torch.float32, where), fewer, strict=True):
            torch.testing.assert_close(a, e)


@everywhere
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_cross_entropy_alone_does_without_the_teacher(share: float, where: Where) -> None:
    t = rounded(only(mixture(), "target_ids", "logprob_weights"), torch.float32)
    t["token_weights"] = torch.zeros(7)
    expected = oracle(t)
    blind = t | {"teacher_hidden": torch.full_like(t["teacher_hidden"], torch.nan)}
    options = {"forward_share": share, "student_softcap": 5.0, "chunk_tokens": 4}
    expected = oracle(t, student_softcap=5.0)
    actual = ours(blind, torch.float32, where, **options)
    assert (actual.per_token == 0).all()
    for name in ("loss", "entropy", "grad_hidden", "grad_weight"):
        assert error(getattr(actual, name), getattr(expected, name)) < 1e-5
    out = outputs(blind, torch.float32, where, **options)
    if share:
        assert (out.reverse_kl == 0).all()
        assert (out.forward_kl == 0).all()


@everywhere
def test_targets_without_weights_are_a_metric(where: Where) -> None:
    t = only(mixture(), "target_ids")
    plain = ours(only(t), torch.float32, where, temperature=0.7)
    with_targets = ours(t, torch.float32, where, temperature=0.7)
    for a, e in zip(with_targets, plain, strict=True):
        assert torch.equal(a, e)
    z = reference.logits(t["student_hidden"], t["student_weight"], temperature=0.7)
    out = outputs(t, torch.float32, where, temperature=0.7)
    assert error(out.logprobs, reference.logprobs(z, t["target_ids"])) < 1e-6


def test_small_token_weights_and_large_logprob_weights_in_fp16() -> None:
    t = rounded(mixture(n=64, v=500, d_s=64, d_t=64), torch.float16)
    for small, large in (
        ("token_weights", "logprob_weights"),
        ("logprob_weights", "token_weights"),
    ):
        t[small], t[large] = torch.full((64,), 1e-6), torch.full((64,), 3e4)
        master = {k: v if k in OF_TOKENS else v.float() for k, v in t.items()}
        w = master["student_weight"].requires_grad_()
        with torch.autocast("cpu", torch.float16):
            linear_divergence(**master).loss.backward()
        assert w.grad is not None
        assert error(w.grad, oracle(t).grad_weight) < 0.005


def test_token_shaped_arguments_and_gradients_that_are_not_wanted() -> None:
    t = mixture(n=6)
    expected = oracle(t)
    shaped = {
        k: v.view(2, 3, *v.shape[1:]) if k in OF_TOKENS or k.endswith("hidden") else v
        for k, v in t.items()
    }
    shaped["forward_share"].requires_grad_()
    shaped["logprob_weights"].requires_grad_()
    w = shaped["student_weight"].requires_grad_()
    out = linear_divergence(**shaped)
    out.loss.backward()
    assert out.logprobs is not None
    assert out.logprobs.shape == (6,)
    assert shaped["forward_share"].grad is None
    assert error(w.grad, expected.grad_weight) < 1e-11


def test_torch_compile_sees_one_operation() -> None:
    t = mixture()
    expected = oracle(t)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(t: dict) -> Any:
        return linear_divergence(**t)

    w = t["student_weight"].requires_grad_()
    out = step(t)
    out.loss.backward()
    assert error(out.loss, expected.loss) < 1e-12
    assert error(w.grad, expected.grad_weight) < 1e-12
    t["target_ids"][3] = 51
    with pytest.raises(ValueError, match="target_ids must lie between 0 and 50, got 51"):
        step(t)


def random_case(seed: int) -> tuple[Tensors, torch.dtype, dict[str, Any], str]:
    r = random.Random(seed)
    n, v = r.randint(1, 9), r.choice([1, 2, 17, 64, 200, 1030])
    dtype = r.choice([torch.float64, torch.float32, torch.bfloat16, torch.float16])
    backend = r.choice(["torch", "triton"]) if dtype != torch.float64 else "torch"
    noise = r.choice([0.01, 0.3, 3.0])
    t = mixture(n=n, v=v, d_s=r.randint(1, 12), d_t=r.randint(12, 20), noise=noise, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"chunk_tokens": r.choice([None, 1, 2, 5])}
    share = r.choice(["none", "float", "tensor", "ends"])
    if share == "ends":
        t["forward_share"] = t["forward_share"].round()
    elif share != "tensor":
        del t["forward_share"]
    if share == "float":
        options["forward_share"] = r.choice([0.0, 1.0, r.random()])
    if share == "none":
        options |= {"divergence": r.choice(DIVERGENCES), "beta": r.uniform(0.1, 0.9)}
    if r.random() < 0.3:
        del t["target_ids"], t["logprob_weights"]
    if r.random() < 0.3:
        t["token_weights"] *= torch.rand(n, generator=generator) < 0.5
    for model in ("student", "teacher"):
        if r.random() < 0.3:
            t[f"{model}_bias"] = torch.randn(v, generator=generator).double()
        if r.random() < 0.3:
            options[f"{model}_softcap"] = r.uniform(2, 9)
    if r.random() < 0.5:
        options["temperature"] = r.uniform(0.5, 2)
    return t, dtype, options, backend


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")
@pytest.mark.parametrize("seed", range(100))
def test_random_problems(seed: int) -> None:
    t, dtype, options, backend = random_case(seed)
    t = rounded(t, dtype)
    mathematical = {k: v for k, v in options.items() if k != "chunk_tokens"}
    expected = oracle(t, **mathematical)
    counts = t["token_weights"] != 0
    actual = ours(t, dtype, Where(backend, "cpu"), **options)
    wide = 1e-10 if dtype == torch.float64 else 1e-4
    narrow = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 0.015}
    off = (actual.per_token - expected.per_token).abs()[counts]
    assert (off <= wide * expected.per_token[counts] + 1e-8).all()
    size = expected.grad_weight.norm() + 1e-3 * t["student_hidden"].norm()
    for name in ("grad_hidden", "grad_weight"):
        difference = getattr(actual, name).double() - getattr(expected, name)
        assert difference.norm() < narrow[dtype] * size, (name, options)
    assert (actual.loss - expected.loss).abs() < wide * (1 + expected.loss.abs())
