"""Tuning: from candidates to a choice, to the user's cache, to what "auto" takes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opcd_kernels import backends, tune, tuned
from opcd_kernels.tune import Candidate, Timed, candidates, choice, measure, problem
from opcd_kernels.tuned import Key, Row, Tuned, merged, nearest, read, write

H100, KEY = "NVIDIA H100", {"device": "NVIDIA H100", "driver": "12040", "triton": "3.7.1"}
CPU = torch.device("cpu")
TILE = (64, 128, 32, 1, 128, 3, 1)
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")


def timed(**seconds: float | None) -> list[Timed]:
    """By name: a block b of "triton", a tile of so many stages of "triton_dual"."""
    found = []
    for name, s in seconds.items():
        kind, number = name[0], int(name[1:])
        of_tile = Candidate("triton_dual", Tuned(tile=(128, 128, 64, 16, 256, number, 1)))
        of_block = Candidate("triton", Tuned(block=number))
        found.append(Timed(of_block if kind == "b" else of_tile, s, "" if s else "refused"))
    return found


def row(d: int = 576, v: int = 49152, head: str = "trained", **seconds: float | None) -> Row:
    found = choice(H100, d, v, head, timed(**seconds or {"b256": 3.0, "b512": 2.0, "t3": 1.0}))
    assert found is not None
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuned.json"


def test_the_fastest_of_each_design_is_chosen() -> None:
    found = row(b256=3.0, b512=2.0, b1024=2.5, t3=1.5, t4=1.0, t2=None)
    assert found["seconds"] == {"triton": 2.0, "triton_dual": 1.0}
    assert found["block"] == 512
    assert found["tile"] == [128, 128, 64, 16, 256, 4, 1]


def test_a_design_that_nothing_could_be_timed_of_is_not_chosen() -> None:
    found = row(b512=2.0, t3=None)
    assert found["seconds"] == {"triton": 2.0}
    assert found["tile"] == []
    assert choice(H100, 8, 9, "frozen", timed(b256=None, t3=None)) is None


def test_without_the_dual_product_there_are_blocks_to_choose() -> None:
    assert {c.backend for c in candidates(dual=False)} == {"triton"}
    assert {c.backend for c in candidates(dual=True)} == {"triton", "triton_dual"}
    assert len({*candidates(dual=True)}) == len(tune.BLOCKS) + len(tune.TILES)


def test_what_is_kept_comes_back(file: Path) -> None:
    rows = [row(), row(head="frozen", b384=1.0)]
    assert read(file, KEY) == ()
    write(file, KEY, rows)
    assert [*read(file, KEY)] == rows
    assert [*file.parent.iterdir()] == [file]
    write(file, KEY, merged(read(file, KEY), [row(b256=9.0)]))
    assert [r["block"] for r in read(file, KEY)] == [256, 384]


@pytest.mark.parametrize("changed", KEY)
def test_another_device_driver_or_version_knows_nothing(changed: str, file: Path) -> None:
    write(file, KEY, [row()])
    assert read(file, KEY | {changed: "other"}) == ()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"key": 1}',
        json.dumps({"key": KEY}),
        json.dumps({"key": KEY, "rows": [{}]}),
        json.dumps({"key": KEY, "rows": [row() | {"block": -1}]}),
        json.dumps({"key": KEY, "rows": [row() | {"block": "512"}]}),
        json.dumps({"key": KEY, "rows": [row() | {"tile": [1, 2]}]}),
        json.dumps({"key": KEY, "rows": [row() | {"seconds": {}}]}),
        json.dumps({"key": KEY, "rows": [row() | {"seconds": {"cuda": 1.0}}]}),
        json.dumps({"key": KEY, "rows": [row() | {"D": 0}]}),
        json.dumps({"key": KEY, "rows": [row() | {"device": "another"}]}),
    ],
)
def test_a_broken_file_is_ignored_and_says_so(text: str, file: Path) -> None:
    file.parent.mkdir()
    file.write_text(text)
    if text.startswith('{"key": 1'):  # another key, whatever it is
        assert read(file, KEY) == ()
        return
    with pytest.warns(UserWarning, match=r"must hold what .* measured, got .*; it is ignored"):
        assert read(file, KEY) == ()


def test_bytes_that_are_no_text_are_ignored(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="it is ignored"):
        assert read(file, KEY) == ()


def test_a_write_that_fails_leaves_the_old_file(file: Path) -> None:
    write(file, KEY, [row()])
    with pytest.raises(TypeError):
        write(file, KEY, [{"what": object()}])
    assert [*read(file, KEY)] == [row()]
    assert [*file.parent.iterdir()] == [file]


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.cache_file(KEY).parent == tmp_path / "opcd-kernels"
    assert tuned.cache_file(KEY) != tuned.cache_file(KEY | {"driver": "13000"})
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the standard says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuned.cache_file(KEY).parent == tmp_path / "home" / ".cache" / "opcd-kernels"


def test_the_nearest_shape_counts() -> None:
    rows = [row(576), row(4096, 151936, b256=1.0), row(576, head="frozen", b1024=1.0)]
    assert nearest(rows, (49152, 700), "trained") == rows[0]
    assert nearest(rows, (128256, 2048), "trained") == rows[1]
    assert nearest(rows, (128256, 2048), "frozen") == rows[2]
    assert nearest([], (128256, 2048), "frozen") is None


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[Row]], torch.device]:
    """A device whose cache holds rows."""

    def keep(rows: list[Row]) -> torch.device:
        key = tuned.key_of(H100)
        write(tuned.cache_file(key), key, rows)
        return torch.device("cuda")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: H100)
    monkeypatch.setattr(backends, "_suits_dual", lambda *_: True)
    tuned._rows_of.cache_clear()
    return keep


def chosen(device: torch.device, head: str = "trained") -> str:
    return backends.chosen_backend(device, torch.bfloat16, True, (49152, 576), head)


def test_auto_takes_what_was_measured(h100: Callable[[list[Row]], torch.device]) -> None:
    pytest.importorskip("triton")
    device = h100([row(b512=2.0, t3=1.0), row(head="frozen", b1024=1.0, t3=2.0)])
    assert chosen(device) == "triton_dual"
    assert chosen(device, "frozen") == "triton"
    best = tuned.tuned_to(device, (49152, 576), "trained")
    assert best == Tuned(512, (128, 128, 64, 16, 256, 3, 1))
    assert tuned.tuned_to(device, (49152, 576), "frozen").block == 1024
    h100([row(b512=1.0, t3=2.0)])  # what is measured anew counts at once
    assert chosen(device) == "triton"


def test_where_nothing_was_measured_auto_takes_the_packaged_table(
    h100: Callable[[list[Row]], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda")
    assert chosen(device) == "triton"
    assert tuned.tuned_to(device, (49152, 576), "trained") == Tuned()
    monkeypatch.setattr(backends, "measurements", lambda: (row(b512=2.0, t3=1.0),))
    assert chosen(device) == "triton_dual"
    h100([row(b512=1.0, t3=2.0)])
    assert chosen(device) == "triton"


def test_a_key_names_all_that_a_time_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12040, raising=False)
    key: Key = tuned.key_of(H100)
    assert set(key) == {"device", "driver", "triton", "torch", "opcd_kernels"}
    assert key["device"] == H100
    assert key["driver"] == "12040"


def told(budget: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Row], str]:
    """What a budget of so many candidates leaves, of two shapes and three candidates."""
    monkeypatch.setattr(tune, "problem", lambda *of: of)
    monkeypatch.setattr(
        tune, "measure", lambda inputs, head, tried, timer: (Timed(c, timer(c)) for c in tried)
    )
    clock, lines = [0], list[str]()

    def timer(candidate: object) -> float:
        clock[0] += 1
        return 1.0 + clock[0] % 3  # the last of three is the fastest

    tried = candidates(dual=True)[:3]
    found = tune.tuning(
        [(64, 128), (8, 16)], CPU, H100, tried, timer, lambda: clock[0] < budget, lines.append
    )
    return [*found], "\n".join(lines)


def test_what_is_worth_most_is_timed_first_and_the_rest_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, text = told(12, monkeypatch)
    assert [(r["D"], r["head"]) for r in rows] == [
        *((64, "trained"), (64, "frozen"), (8, "trained"), (8, "frozen")),
    ]
    assert rows[0]["block"] == 384
    assert "not timed" not in text
    rows, text = told(4, monkeypatch)
    assert [(r["D"], r["head"]) for r in rows] == [(64, "trained"), (64, "frozen")]
    assert rows[1]["block"] == 512, "the fastest of what was timed"
    _, rest = text.split("not timed, as the time was over:")
    assert "D 64, V 128, trained head" not in rest
    assert rest.count("D 64, V 128, frozen head, triton") == 2
    assert "D 8, V 16, trained head\n  D 8, V 16, frozen head" in rest
    assert told(0, monkeypatch)[0] == []


def test_a_short_time_compares_the_designs() -> None:
    assert [c.backend for c in candidates(dual=True)[:2]] == ["triton", "triton_dual"]


def once(call: Callable[[], object]) -> float:
    call()
    return 0.5


@interpreted
@pytest.mark.parametrize("head", tuned.HEADS)
def test_every_candidate_is_checked_and_timed(head: str) -> None:
    pytest.importorskip("triton")
    tried = [Candidate("triton", Tuned(block=8)), Candidate("triton_dual", Tuned(tile=TILE))]
    found = [*measure(problem(24, 64, 300, head, CPU), head, tried, once)]
    assert found == [Timed(candidate, 0.5) for candidate in tried]


@interpreted
def test_a_candidate_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    dual_triton = pytest.importorskip("opcd_kernels.dual_triton")
    right = dual_triton.DualProduct.product

    def wrong(self: object, *hidden: torch.Tensor) -> torch.Tensor:
        return right(self, *hidden).mul_(1.02)

    monkeypatch.setattr(dual_triton.DualProduct, "product", wrong)
    inputs = problem(24, 64, 300, "frozen", CPU)
    (found,) = measure(inputs, "frozen", [Candidate("triton_dual", Tuned(tile=TILE))], once)
    assert found.seconds is None
    assert "from plain PyTorch" in found.refused


@interpreted
def test_what_the_memory_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def full(call: Callable[[], object]) -> float:
        raise torch.OutOfMemoryError("out of memory: 3 GB\nmore")

    inputs = problem(8, 16, 100, "frozen", CPU)
    (found,) = measure(inputs, "frozen", [Candidate("triton", Tuned(block=8))], full)
    said = "OutOfMemoryError: out of memory: 3 GB"
    assert found == Timed(Candidate("triton", Tuned(block=8)), None, said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_without_a_gpu_it_says_so() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "opcd_kernels.tune"], capture_output=True, text=True, cwd=root,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("tuning must run on the GPU that it is for")
    assert done.stderr.count("\n") == 1
