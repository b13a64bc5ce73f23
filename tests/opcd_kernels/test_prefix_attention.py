"""The Triton kernel, interpreted or compiled, against each sequence alone by definition."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from opcd_kernels.prefix_attention import prefix_attention_triton
from tests.attention_oracle import LENGTHS, VARIANTS, grouped, oracle, problem

SCALE = 0.3
DEVICES = [
    pytest.param(
        "cpu",
        id="interpreted",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here"),
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel leaves out must show."""
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan, **options)
    )


def assert_as_exact_as_plain(
    device: str, dtype: torch.dtype, prefix: int, options: dict, **sizes: int
) -> None:
    p = problem(prefix, **sizes)
    expected = oracle(p, SCALE, **options)
    plain = oracle(p.to(dtype), SCALE, **options)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    sinks = options.get("sinks")
    options = options | ({"sinks": sinks.to(device)} if sinks is not None else {})
    operands = [x.to(device, dtype) for x in p]
    bounds = torch.tensor([[0, prefix]] * len(LENGTHS)).int().to(device)
    actual = prefix_attention_triton(
        *operands, bounds, cu_seqlens, max(LENGTHS), SCALE, **options
    ).cpu()
    assert actual.dtype == dtype
    error = (actual.double() - expected).abs().max().item()
    bound = 2 * (plain.double() - expected).abs().max().item()
    assert error <= bound + 1e-6 * expected.abs().max().item(), (error, bound)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("prefix", [0, 13, 150])
def test_it_equals_the_definition(name: str, prefix: int, device: str) -> None:
    assert_as_exact_as_plain(device, torch.float32, prefix, VARIANTS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["dense", "everything"])
def test_sequences_behind_prefixes_of_their_own(name: str, device: str) -> None:
    parts = grouped()
    expected = torch.cat([oracle(p, SCALE, **VARIANTS[name], lengths=n) for p, n in parts])
    query, key, value = (torch.cat([p[i] for p, _ in parts]).to(device).float() for i in range(3))
    prefixes = [torch.cat([p[i] for p, _ in parts], 1).to(device).float() for i in (3, 4)]
    sizes = [p.prefix_key.shape[1] for p, n in parts for _ in n]
    ends = {
        id(p): sum(q.prefix_key.shape[1] for q, _ in parts[: i + 1])
        for i, (p, _) in enumerate(parts)
    }
    last = [ends[id(p)] for p, n in parts for _ in n]
    bounds = torch.tensor([[e - s, e] for e, s in zip(last, sizes, strict=True)]).int().to(device)
    lengths = [n for _, group in parts for n in group]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    options = {k: v.to(device) if k == "sinks" else v for k, v in VARIANTS[name].items()}
    actual = prefix_attention_triton(
        query, key, value, *prefixes, bounds, cu_seqlens, max(lengths), SCALE, **options
    )
    assert (actual.cpu().double() - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("device", DEVICES)
def test_bf16(device: str) -> None:
    assert_as_exact_as_plain(device, torch.bfloat16, 70, VARIANTS["everything"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 6, 8), (6, 1, 24), (6, 3, 40)])
def test_heads_and_widths_that_are_no_powers_of_two(
    device: str, heads: int, kv_heads: int, width: int
) -> None:
    sizes = {"heads": heads, "kv_heads": kv_heads, "width": width}
    assert_as_exact_as_plain(device, torch.float32, 21, VARIANTS["everything"], **sizes)


def test_widths_that_it_cannot_hold_are_refused() -> None:
    q, v = torch.zeros(2, 2, 16), torch.zeros(2, 2, 32)
    with pytest.raises(ValueError, match=r"equally wide, at most 256, got 16 and 32"):
        prefix_attention_triton(q, q, v, q, v, torch.tensor([[0, 2]]), torch.tensor([0, 2]), 2, 1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_without_numbers_meet_no_kernel(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of such a pass the memory is wanted, and their addresses are nobody's."""
    monkeypatch.undo()
    shapes = (3, 4, 16), *((3, 2, 16),) * 2, *((2, 7, 16),) * 2
    bounds, cu_seqlens = torch.tensor([[0, 7]]).int(), torch.tensor([0, 3]).int()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    query, *others = (mode.from_tensor(torch.zeros(shape, device=device)) for shape in shapes)
    where = bounds.to(device), cu_seqlens.to(device)
    out = prefix_attention_triton(query, *others, *where, 3, SCALE, softcap=20.0)
    assert out.shape == query.shape
    assert isinstance(out, FakeTensor)


@pytest.mark.parametrize("far", ["heads", "keys"])
def test_offsets_pass_two_to_the_31(far: str, tmp_path: Path) -> None:
    """Prefixes of a million tokens: key heads, and keys of one, lie far apart in a sparse file."""
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here")
    kv_heads = 4 if far == "heads" else 1
    p = problem(150, heads=kv_heads, kv_heads=kv_heads)
    strides = (2**30, 16, 1) if far == "heads" else (16, 2**24, 1)
    size = 3 * strides[0] + 150 * strides[1]
    moved = []
    for name, x in (("key", p.prefix_key), ("value", p.prefix_value)):
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=torch.bfloat16)
        moved.append(file.as_strided(x.shape, strides).copy_(x))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    bounds = torch.tensor([[0, 150]] * len(LENGTHS)).int()
    own = [x.bfloat16() for x in p[:3]]
    near, there = (
        prefix_attention_triton(*own, *prefix, bounds, cu_seqlens, max(LENGTHS), SCALE)
        for prefix in ([x.bfloat16() for x in p[3:]], moved)
    )
    assert torch.equal(near, there)
