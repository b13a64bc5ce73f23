"""Attention in two parts, merged, against each sequence alone by definition."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from opcd.passes.attention import FLASH_CUDA, Operands, Shape, choose_backend, prefix_attention
from opcd.passes.packing import Packing
from tests.attention_oracle import LENGTHS, VARIANTS, Problem, grouped, oracle, problem

SCALE = 0.3
CPU = torch.device("cpu")


def ours(p: Problem, backend: str, **options: object) -> Tensor:
    operands = Operands(*p[:3], (p.prefix_key,), (p.prefix_value,))
    return prefix_attention(operands, Packing([LENGTHS], CPU), Shape(SCALE, **options), backend)


def assert_as_exact_as_plain(p: Problem, dtype: torch.dtype, backend: str, options: dict) -> None:
    expected = oracle(p, SCALE, **options)
    plain = oracle(p.to(dtype), SCALE, **options)
    actual = ours(p.to(dtype), backend, **options)
    assert actual.dtype == dtype
    size = expected.abs().max().item()
    error = (actual.double() - expected).abs().max().item()
    bound = 2 * (plain.double() - expected).abs().max().item() + 4e-7 * size
    assert error <= bound, (error, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 13, 40])
@pytest.mark.parametrize("name", VARIANTS)
def test_plain_equals_the_definition(name: str, prefix: int, dtype: torch.dtype) -> None:
    assert_as_exact_as_plain(problem(prefix), dtype, "plain", VARIANTS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 13, 600])
@pytest.mark.parametrize("name", ["dense", "sinks"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_the_fused_cpu_kernel_equals_the_definition(
    name: str, prefix: int, dtype: torch.dtype, kv_heads: int
) -> None:
    p = problem(prefix, kv_heads=kv_heads)
    assert_as_exact_as_plain(p, dtype, "aten flash, cpu", VARIANTS[name])


@pytest.mark.parametrize("prefix", [0, 13])
@pytest.mark.parametrize("backend", ["plain", "aten flash, cpu"])
def test_gradients_flow_through_the_merge(backend: str, prefix: int) -> None:
    p = problem(prefix)
    weight = torch.randn(p.query.shape, generator=torch.Generator().manual_seed(5)).double()
    found = []
    for attend, dtype in ((lambda q: oracle(q, SCALE), torch.float64),
                          (lambda q: ours(q, backend), torch.float32)):  # fmt: skip
        leaves = Problem(*(x.clone().to(dtype).requires_grad_() for x in p))
        (attend(leaves) * weight).sum().backward()
        found.append([x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves])
    for name, expected, actual in zip(Problem._fields, *found, strict=True):
        assert torch.allclose(actual.double(), expected, rtol=1e-4, atol=2e-5), name


def behind_prefixes_of_their_own(
    parts: list[tuple[Problem, tuple[int, ...]]], backend: str, **options: object
) -> Tensor:
    own = (torch.cat([p[i] for p, _ in parts]) for i in range(3))
    prefixes = (tuple(p[i] for p, _ in parts) for i in (3, 4))
    packing = Packing([lengths for _, lengths in parts], CPU)
    shape = Shape(SCALE, **options)
    return prefix_attention(Operands(*own, *prefixes), packing, shape, backend)


GROUPED = [
    *(("plain", name) for name in VARIANTS),
    *(("aten flash, cpu", name) for name in ("dense", "sinks")),
]


@pytest.mark.parametrize(("backend", "name"), GROUPED)
def test_sequences_behind_prefixes_of_their_own(backend: str, name: str) -> None:
    parts = grouped()
    expected = [oracle(p, SCALE, **VARIANTS[name], lengths=lengths) for p, lengths in parts]
    low = [(p.to(torch.float32), lengths) for p, lengths in parts]
    actual = behind_prefixes_of_their_own(low, backend, **VARIANTS[name])
    assert torch.allclose(actual.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["plain", "aten flash, cpu"])
def test_gradients_behind_prefixes_of_their_own(backend: str) -> None:
    found = []
    for dtype in (torch.float64, torch.float32):
        parts = [
            (Problem(*(x.clone().to(dtype).requires_grad_() for x in p)), lengths)
            for p, lengths in grouped()
        ]
        if dtype == torch.float64:
            out = torch.cat([oracle(p, SCALE, lengths=lengths) for p, lengths in parts])
        else:
            out = behind_prefixes_of_their_own(parts, backend)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).double()
        (out * weight).sum().backward()
        found.append([x.grad for p, _ in parts for x in p])
    for expected, actual in zip(*found, strict=True):
        assert (actual is None) == (expected is None) or not expected.numel()
        if actual is not None and actual.numel():
            assert torch.allclose(actual.double(), expected, rtol=1e-4, atol=2e-5)


def test_cuda_varlen_is_called_as_it_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge around the CUDA kernels, with their contract played by the definition."""

    def varlen(q, k, v, cu_q, cu_k, longest, causal, scale):
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert longest == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        group = q.shape[1] // k.shape[1]
        outs, lses = [], []
        spans = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
        for (a, b), (c, d) in spans:
            keys = k[c:d].repeat_interleave(group, 1)
            scores = torch.einsum("qhd,khd->hqk", q[a:b], keys).float() * scale
            if causal:
                hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(1)
                scores = scores.masked_fill(hidden, float("-inf"))
            values = v[c:d].repeat_interleave(group, 1).float()
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
            lses.append(scores.logsumexp(-1))
        return torch.cat(outs).to(q.dtype), torch.cat(lses, 1)

    monkeypatch.setitem(FLASH_CUDA, "played", ("torch", varlen))
    for prefix in (0, 13):
        for name in ("dense", "sinks"):
            assert_as_exact_as_plain(problem(prefix), torch.float32, "played", VARIANTS[name])
    parts = grouped()
    expected = torch.cat([oracle(p, SCALE, lengths=lengths) for p, lengths in parts])
    actual = behind_prefixes_of_their_own(
        [(p.to(torch.float32), lengths) for p, lengths in parts], "played"
    )
    assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_backend_is_chosen_by_what_it_can_do() -> None:
    q, wide = torch.zeros(3, 2, 16), torch.zeros(3, 2, 32)
    kept = (torch.zeros(2, 5, 16),)
    same = Operands(q, q, q, kept, kept)
    assert choose_backend(same, Shape(1.0)) == "aten flash, cpu"
    assert choose_backend(same, Shape(1.0, sinks=torch.zeros(2))) == "aten flash, cpu"
    assert choose_backend(same, Shape(1.0, window=4)) == "plain"
    assert choose_backend(same, Shape(1.0, softcap=4.0)) == "plain"
    assert choose_backend(Operands(q, q, wide, kept, kept), Shape(1.0)) == "plain"
    # The gradient of a sink goes through the log-sum-exp, which the fused kernel does not return.
    grad = q.clone().requires_grad_()
    sinks = Shape(1.0, sinks=torch.zeros(2))
    for learned in (Operands(grad, q, q, kept, kept), Operands(q, grad, q, kept, kept)):
        assert choose_backend(learned, sinks) == "plain"
    assert Shape(1.0, window=20).within(20).window is None
    assert Shape(1.0, window=20).within(21).window == 20


def test_rectangles_are_at_most_half_padding() -> None:
    packing = Packing([LENGTHS], CPU)
    assert [(b.tokens, b.rows, b.width) for b in packing.blocks] == [
        (slice(0, 52), 3, 19),
        (slice(52, 61), 2, 5),
        (slice(61, 62), 1, 1),
    ]
    assert packing.offsets.tolist() == [i for n in LENGTHS for i in range(n)]


def test_rectangles_hold_sequences_of_all_groups() -> None:
    packing = Packing([(6, 2), (6, 3)], CPU)
    assert [(b.rows, b.width) for b in packing.blocks] == [(3, 6), (1, 2)]
    row = torch.arange(17.0)[:, None, None]
    parts = [block.gather(block.spread(row)) for block in packing.blocks]
    assert torch.equal(packing.joined(parts), row)
    assert packing.positions([10, 20]).tolist() == [
        *range(10, 16), *range(10, 12), *range(20, 26), *range(20, 23)
    ]  # fmt: skip
