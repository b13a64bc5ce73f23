"""The kernel that keeps the logits on the chip: bf16, without bias and softcap."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from opcd_kernels import linear_divergence
from opcd_kernels.backends import check_backend, chosen_backend, fits_dual
from opcd_kernels.dual_triton import DualProduct, Tile
from opcd_kernels.options import Options
from tests.opcd_kernels.problems import (
    DIVERGENCES,
    DUAL_ON_CUDA,
    Tensors,
    Where,
    assert_as_exact_as_plain,
    error,
    oracle,
    ours,
    problem,
    rounded,
)

BF16 = torch.bfloat16
WHERE = [
    pytest.param(
        Where("triton_dual", "cpu"),
        id="interpreted",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here"),
    ),
    DUAL_ON_CUDA,
]
TILES = [
    Tile(),
    Tile(64, 128, 32, group=1, threads=128),
    Tile(128, 64, 64, group=2, threads=128, programs=0),
]
everywhere = pytest.mark.parametrize("where", WHERE)


def shared(tensors: Tensors) -> Tensors:
    """One head for both models."""
    return tensors | {"teacher_weight": tensors["student_weight"]}


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01, 0.001])
def test_keeps_its_digits(divergence: str, noise: float, where: Where) -> None:
    t = rounded(problem(n=64, v=500, d_s=64, d_t=64, noise=noise), BF16)
    actual = assert_as_exact_as_plain(t, BF16, where, divergence=divergence)
    expected = oracle(t, divergence=divergence)
    assert error(actual.grad_hidden, expected.grad_hidden) < 0.005
    assert error(actual.grad_weight, expected.grad_weight) < 0.005
    assert error(actual.entropy, expected.entropy) < 1e-5
    assert (actual.per_token - expected.per_token).abs().le(0.005 * expected.per_token).all()
    assert (actual.per_token >= 0).all()


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_different_widths_temperature_and_chunks(divergence: str, where: Where) -> None:
    t = problem(n=150, v=700, d_s=24, d_t=13) | {
        "token_weights": torch.rand(150, generator=torch.Generator().manual_seed(1)).double()
    }
    options = {"divergence": divergence, "temperature": 0.7, "beta": 0.3, "vocab_size": 650}
    assert_as_exact_as_plain(t, BF16, where, **options, chunk_tokens=140)


@everywhere
def test_peaked_tokens_keep_a_small_divergence(where: Where) -> None:
    """δ is large wherever the mass is not, and so is its rounding."""
    t = problem(n=64, v=300, d_s=16, d_t=16, seed=1)
    t = rounded(t | {k: 20 * t[k] for k in ("student_weight", "teacher_weight")}, BF16)
    expected, actual = oracle(t).per_token, ours(t, BF16, where).per_token
    small = (expected > 1.2e-4) & (expected < 1e-3)
    assert small.any()
    assert (actual - expected).abs()[small].le(0.005 * expected[small]).all()


@everywhere
def test_one_head_for_both_models_is_as_exact(where: Where) -> None:
    t = shared(rounded(problem(n=20, v=300, d_s=40, d_t=40, noise=0.05), BF16))
    t["teacher_hidden"] = t["student_hidden"] + 2**-6 * t["teacher_hidden"].sign()
    t = rounded(t, BF16)
    expected = oracle(t)
    h, w, h_t = (
        t[k].to(where.device, BF16) for k in ("student_hidden", "student_weight", "teacher_hidden")
    )
    h.requires_grad_()
    out = linear_divergence(h, w, h_t, w, backend=where.backend)
    out.loss.backward()
    assert h.grad is not None
    assert error(h.grad, expected.grad_hidden) < 0.005
    assert error(out.per_token, expected.per_token) < 0.002


@everywhere
def test_a_head_is_fetched_once_where_both_models_share_it(
    monkeypatch: pytest.MonkeyPatch, where: Where
) -> None:
    t = {k: v.to(where.device, BF16) for k, v in problem(n=2, d_t=8).items()}
    shared_heads = []
    right = DualProduct.product

    def product(self: DualProduct, *hidden: torch.Tensor) -> torch.Tensor:
        shared_heads.append(self._shared)
        return right(self, *hidden)

    monkeypatch.setattr(DualProduct, "product", product)
    for head in (t["student_weight"].view(51, 8), t["student_weight"].clone()):
        t["teacher_weight"] = head
        linear_divergence(**t, backend=where.backend)
    assert shared_heads == [True, False]


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_models_have_neither_divergence_nor_gradient(
    divergence: str, where: Where
) -> None:
    t = problem(v=300)
    t |= {k.replace("student", "teacher"): v for k, v in t.items() if k.startswith("student")}
    actual = ours(t, BF16, where, divergence=divergence)
    assert actual.per_token.abs().max() < 1e-12
    assert actual.grad_weight.abs().max() < 1e-6
    assert actual.entropy.min() > 1


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_models_far_apart(divergence: str, where: Where) -> None:
    t = problem(d_t=8, v=400)
    t["teacher_weight"] = -3 * t["student_weight"]
    t["teacher_hidden"] = 2 * t["student_hidden"]
    t = rounded(t, BF16)
    actual, expected = ours(t, BF16, where, divergence=divergence), oracle(t, divergence=divergence)
    assert error(actual.per_token, expected.per_token) < 0.003
    saturated = divergence == "jsd"  # at log 2, its gradient is 1e-9
    assert error(actual.grad_weight, expected.grad_weight) < (0.02 if saturated else 0.005)


@everywhere
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_shift_of_all_logits_changes_nothing(divergence: str, where: Where) -> None:
    plain = problem(d_s=8, d_t=8, noise=0.1)
    # One more hidden unit, which adds 300 to the student's logits and takes 300 from the teacher's.
    ones, shift = torch.ones(7, 1).double(), torch.full((51, 1), 300.0).double()
    moved = {
        "student_hidden": torch.cat([plain["student_hidden"], ones], 1),
        "student_weight": torch.cat([plain["student_weight"], shift], 1),
        "teacher_hidden": torch.cat([plain["teacher_hidden"], ones], 1),
        "teacher_weight": torch.cat([plain["teacher_weight"], -shift], 1),
    }
    before, after = (ours(t, BF16, where, divergence=divergence) for t in (plain, moved))
    assert error(after.grad_weight[:, :8], before.grad_weight) < 0.006
    assert error(after.per_token, before.per_token) < 0.003


@everywhere
@pytest.mark.parametrize(("n", "v"), [(0, 5), (1, 1), (1, 7), (2, 128), (129, 129), (2, 70_000)])
def test_small_aligned_and_wide_shapes(n: int, v: int, where: Where) -> None:
    t = problem(n=n, v=v)
    actual = assert_as_exact_as_plain(t, BF16, where)
    assert actual.per_token.shape == actual.entropy.shape == (n,)
    if v == 1 or n == 0:
        assert actual.loss == 0
        assert (actual.grad_weight == 0).all()


@everywhere
def test_a_token_of_weight_zero_counts_for_nothing_even_if_infinite(where: Where) -> None:
    t = rounded(problem(n=3), BF16)
    t["teacher_hidden"][1] = torch.nan
    t["student_hidden"][1] = torch.inf
    expected = oracle({k: v[[0, 2]] if k.endswith("hidden") else v for k, v in t.items()})
    for device in {"cpu", where.device}:
        t["token_weights"] = torch.tensor([0.5, 0.0, 0.5], device=device)
        actual = ours(t, BF16, where)
        assert error(actual.per_token[[0, 2]], expected.per_token) < 0.002
        assert actual.per_token[1] == actual.entropy[1] == 0
        assert (actual.grad_hidden[1] == 0).all()
        assert error(actual.grad_weight, expected.grad_weight) < 0.005


@everywhere
def test_operands_that_tiles_cannot_be_fetched_from(where: Where) -> None:
    """Rows off a multiple of 16 bytes, transposed, or every other column."""
    t = {k: v.to(where.device, BF16) for k, v in problem(n=5, d_s=16, d_t=16).items()}
    expected = linear_divergence(**t, backend=where.backend).per_token
    flat = t["student_weight"].new_zeros(t["student_weight"].numel() + 1)[1:]
    t["student_weight"] = flat.view_as(t["student_weight"]).copy_(t["student_weight"])
    assert t["student_weight"].data_ptr() % 16 != 0
    t["teacher_weight"] = t["teacher_weight"].T.contiguous().T
    t["student_hidden"] = t["student_hidden"].repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(linear_divergence(**t, backend=where.backend).per_token, expected)


@everywhere
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_every_entry_is_written(weight: float, where: Where) -> None:
    """Rows of weight 0 on a GPU's memory come this far."""
    t = {k: v.to(where.device, BF16) for k, v in problem(n=3, v=200).items()}
    options = Options("reverse_kl", 0.5, 1.0, None, None, 200)
    dual = DualProduct(t["student_weight"], t["teacher_weight"], 3, options, need_grad=True)
    for buffer in (dual._entries, dual._statistics):
        buffer.fill_(torch.nan)
    factors = torch.full((3,), weight, device=where.device)
    *values, dz, _ = dual(t["student_hidden"], t["teacher_hidden"], factors)
    for x in (*values, dz):
        assert x.isfinite().all()
        assert x.bool().any() == bool(weight)


@everywhere
def test_the_tile_is_free(where: Where) -> None:
    t = {k: v.to(where.device, BF16) for k, v in problem(n=200, v=300, d_s=40).items()}
    options = Options("reverse_kl", 0.5, 1.0, None, None, 300)
    results = []
    for tile in (
        Tile(),
        Tile(64, 128, 32, group=1, threads=128),
        Tile(128, 64, 64, group=2, threads=128, programs=0),
    ):
        heads = t["student_weight"], t["teacher_weight"]
        dual = DualProduct(*heads, 200, options, need_grad=True, tile=tile)
        value, entropy, dz, _ = dual(
            t["student_hidden"], t["teacher_hidden"], torch.ones(200, device=where.device)
        )
        results.append((value, entropy, dz.clone()))
    for value, entropy, dz in results[1:]:
        assert error(value, results[0][0]) < 1e-5
        assert error(entropy, results[0][1]) < 1e-6
        assert error(dz, results[0][2]) < 0.006


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")
def test_what_it_cannot_do_is_said() -> None:
    h, w = torch.randn(2, 8), torch.randn(5, 8)
    low = [x.to(BF16) for x in (h, w, h, w)]
    with pytest.raises(ValueError, match=r"must have bf16.*float32 on cpu; pass backend='triton'"):
        linear_divergence(h, w, h, w, backend="triton_dual")
    with pytest.raises(ValueError, match="with one of these"):
        linear_divergence(*low, student_softcap=30.0, backend="triton_dual")
    with pytest.raises(ValueError, match="with one of these"):
        linear_divergence(*low, teacher_bias=torch.zeros(5), backend="triton_dual")
    for more in (
        {"forward_share": 0.5},
        {"forward_share": torch.ones(2)},
        {"target_ids": torch.zeros(2).long()},
    ):
        with pytest.raises(ValueError, match="forward_share between 0 and 1 or target_ids"):
            linear_divergence(*low, **more, backend="triton_dual")
    for share, divergence in ((0.0, "reverse_kl"), (1.0, "forward_kl")):
        pure, found = (
            linear_divergence(*low, **option, backend="triton_dual").per_token
            for option in ({"divergence": divergence}, {"forward_share": share})
        )
        assert torch.equal(pure, found)


def test_a_cpu_has_no_triton_unless_it_interprets() -> None:
    """In a process of its own, as on a machine with a GPU."""
    code = (
        "import torch; from opcd_kernels.backends import check_backend\n"
        "check_backend('triton_dual', torch.device('cpu'), torch.bfloat16, True)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert "must have tensors on a GPU, in bf16, fp16 or fp32, got torch.bfloat16 on cpu; pass" in (
        done.stderr
    )


# Capability, and the shared memory that a program may have (CUDA C++ Programming Guide).
@pytest.mark.parametrize(
    ("gpu", "capability", "shared_kib", "fits"),
    [
        ("A100", (8, 0), 163, False),
        ("RTX 3090", (8, 6), 99, False),
        ("RTX 4090", (8, 9), 99, False),
        ("H100", (9, 0), 227, True),
        ("B200", (10, 0), 227, True),
        ("B300", (10, 3), 227, True),
        ("RTX 5090", (12, 0), 99, False),
        ("ROCm", (9, 4), 0, False),
    ],
)
def test_gpus_that_have_what_it_needs(
    gpu: str, capability: tuple[int, int], shared_kib: int, fits: bool
) -> None:
    assert fits_dual(capability, shared_kib * 1024) == fits


def test_a_gpu_without_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(major=12, minor=0, shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    arguments = torch.device("cuda"), torch.bfloat16, True
    with pytest.raises(ValueError, match="9 or 10 with 229504 bytes of shared memory a program"):
        check_backend("triton_dual", *arguments)
    check_backend("triton", *arguments)
    assert chosen_backend(*arguments, (50000, 1024), "trained") == "triton"
    card.major, card.shared_memory_per_block_optin = 9, 232448
    check_backend("triton_dual", *arguments)
