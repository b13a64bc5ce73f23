"""Attention in two parts, merged, against each sequence alone by definition."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from opcd.passes.attention import Operands, Shape, cached_attention, prefix_attention
from opcd.passes.backends import Kind, choose_backend
from opcd.passes.flash import KERNELS, Lengths, VarlenFlash
from opcd.passes.packing import Packing
from tests.attention_oracle import LENGTHS, VARIANTS, Problem, grouped, oracle, problem

SCALE = 0.3
CPU = torch.device("cpu")


def attended(q: Tensor, k: Tensor, v: Tensor, at: Lengths) -> tuple[Tensor, Tensor]:
    """What kernels of variable length document: out (N, H, D) and lse (H, N), by definition."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    spans = zip(pairwise(at.cu_q.tolist()), pairwise(at.cu_k.tolist()), strict=True)
    for (a, b), (c, d) in spans:
        keys = k[c:d].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys).float() * at.scale
        if at.causal:
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        values = v[c:d].repeat_interleave(group, 1).float()
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs).to(q.dtype), torch.cat(lses, 1)


def played_forward(q: Tensor, k: Tensor, v: Tensor, at: Lengths) -> tuple:
    assert at.cu_q.dtype == at.cu_k.dtype == torch.int32
    assert at.longest == (int(at.cu_q.diff().max()), int(at.cu_k.diff().max()))
    assert min(q.stride(-1), k.stride(-1), v.stride(-1)) == 1
    return *attended(q, k, v, at), (torch.tensor([len(q), len(k)]),)


def played_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    at: Lengths,
    random: tuple,
) -> tuple[Tensor, Tensor, Tensor]:
    """From probabilities exp(score − lse), as FlashAttention does: `out` and `lse` are the whole
    softmax's, which is more than these keys."""
    assert random[0].tolist() == [len(q), len(k)], "what the forward of this part kept"
    assert grad.is_contiguous()
    assert lse.is_contiguous()
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad * out).sum(-1)  # (N, H)
    spans = zip(pairwise(at.cu_q.tolist()), pairwise(at.cu_k.tolist()), strict=True)
    for (a, b), (c, d) in spans:
        keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * at.scale
        p = torch.exp(scores - lse[:, a:b, None])
        if at.causal:
            p = p.tril()
        dp = torch.einsum("qhd,khd->hqk", grad[a:b], values)
        ds = p * (dp - delta[a:b].T[..., None]) * at.scale
        dq[a:b] = torch.einsum("hqk,khd->qhd", ds, keys)
        for whole, part in (
            (dk, torch.einsum("hqk,qhd->khd", ds, q[a:b])),
            (dv, torch.einsum("hqk,qhd->khd", p, grad[a:b])),
        ):
            whole[c:d] = part.unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for CUDA, their contract played by the definition."""
    monkeypatch.setitem(KERNELS, "played", VarlenFlash(played_forward, played_backward))


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


FUSED = ["aten flash, cpu", "played"]


@pytest.mark.parametrize("prefix", [0, 13])
@pytest.mark.parametrize("backend", ["plain", *FUSED])
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


@pytest.mark.parametrize("backend", ["plain", *FUSED])
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


def test_cuda_varlen_is_called_as_it_is_documented() -> None:
    """The merge around the CUDA kernels."""
    for prefix in (0, 13):
        for name in ("dense", "sinks"):
            assert_as_exact_as_plain(problem(prefix), torch.float32, "played", VARIANTS[name])
    parts = grouped()
    expected = torch.cat([oracle(p, SCALE, lengths=lengths) for p, lengths in parts])
    actual = behind_prefixes_of_their_own(
        [(p.to(torch.float32), lengths) for p, lengths in parts], "played"
    )
    assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_a_sink_is_the_mask_of_a_cache_s_last_slot(
    window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    query, keys, values = normal(3, 6, 16), normal(3, 2, 24, 16), normal(3, 2, 24, 16)
    keys[:, :, -8:] = values[:, :, -8:] = 0
    position = torch.tensor([0, 7, 15])[:, None]
    distance = position - torch.arange(24)
    visible = (distance >= 0) & (distance < (window or 24))
    shape = Shape(SCALE, window, sinks=torch.linspace(-2, 3, 6).bfloat16().double())
    scores = torch.einsum("bhd,bhsd->bhs", query, keys.repeat_interleave(3, 1)) * SCALE
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    sinks = shape.sinks[None, :, None].expand(3, -1, -1)
    shares = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    expected = torch.einsum("bhs,bhsd->bhd", shares, values.repeat_interleave(3, 1))
    monkeypatch.setattr("opcd.passes.attention._softmax", None)  # which would widen the whole cache
    low = [x.to(dtype) for x in (query, keys, values)]
    actual = cached_attention(*low, visible, shape._replace(sinks=shape.sinks.to(dtype)))
    bound = 1e-5 if dtype == torch.float32 else 0.01
    assert actual.dtype == dtype
    assert torch.allclose(actual.double(), expected, atol=bound)


def test_a_backend_is_chosen_by_what_it_can_do() -> None:
    q, wide = torch.zeros(3, 2, 16), torch.zeros(3, 2, 32)
    kept = (torch.zeros(2, 5, 16),)

    def chosen(query: Tensor, key: Tensor, value: Tensor, **options: object) -> str:
        operands = Operands(query, key, value, kept, kept)
        return choose_backend(Kind.of(operands, Shape(1.0, **options)))

    assert chosen(q, q, q) == "aten flash, cpu"
    assert chosen(q, q, q, sinks=torch.zeros(2)) == "aten flash, cpu"
    assert chosen(q, q, q, window=4) == "plain"
    assert chosen(q, q, q, softcap=4.0) == "plain"
    assert chosen(q, q, wide) == "plain"
    # The gradient of a sink goes through the log-sum-exp, which the fused kernel does not return.
    grad = q.clone().requires_grad_()
    for learned in ((grad, q, q), (q, grad, q)):
        assert chosen(*learned, sinks=torch.zeros(2)) == "plain"
        assert chosen(*learned) == "aten flash, cpu"
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
