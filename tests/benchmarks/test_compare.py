"""What a comparison with stored results finds, and what it does not."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import compare as module
from benchmarks import designs, summary
from benchmarks import rows as rows_module
from benchmarks.compare import compare, report

DEVICE = "a GPU"


def row(provider: str, seconds: float, spread: float = 0.01, **facts: object) -> dict:
    """Nine rounds, half of them within `spread` of the median on either side."""
    return {
        "device": DEVICE,
        "torch": "2.11.0",
        "commit": "0123456789abcdef",
        "date": "2026-01-01",
        "question": "loss",
        "provider": provider,
        "N": 8192,
        "head": "trained",
        "median_s": seconds,
        "min_s": seconds * (1 - 2 * spread),
        "q1_s": seconds * (1 - spread),
        "q3_s": seconds * (1 + spread),
        "max_s": seconds * (1 + 2 * spread),
        "rounds": 9,
        **facts,
    }


PEERS = [row("trl", 0.05), row("liger", 0.1), row("plain", 0.2)]


def worse(stored: list[dict], now: list[dict]) -> list[tuple[str, str]]:
    return [(c.row["provider"], c.fact) for c in compare(stored, now).worse]


def test_a_run_compared_with_itself_is_clean() -> None:
    rows = [*PEERS, row("ours", 0.03, floor_share=0.8, peak_mib=900, gradient_error=0.002)]
    found = compare(rows, rows)
    assert found.compared == 4
    assert not any((found.worse, found.better, found.peers, found.vanished, found.new))
    assert report(found, rows, rows).startswith("clean: 4 rows compared")
    assert "\n" not in report(found, rows, rows)


def test_time_beyond_noise_is_worse_and_within_it_is_not() -> None:
    stored = [*PEERS, row("ours", 1.0)]
    assert worse(stored, [*PEERS, row("ours", 1.04)]) == []
    assert worse(stored, [*PEERS, row("ours", 1.06)]) == [("ours", "median_s")]
    assert compare(stored, [*PEERS, row("ours", 0.9)]).better[0].ratio == pytest.approx(0.9)
    noisy = [*PEERS, row("ours", 1.0, spread=0.1)]
    assert worse(noisy, [*PEERS, row("ours", 1.15, spread=0.1)]) == []
    assert worse(noisy, [*PEERS, row("ours", 1.5, spread=0.1)]) == [("ours", "median_s")]


def test_fewer_rounds_and_rows_without_quartiles_need_a_larger_change() -> None:
    old = row("ours", 1.0, spread=0.005)
    del old["q1_s"], old["q3_s"]
    assert worse([old], [row("ours", 1.1)]) == [("ours", "median_s")]
    once = row("ours", 1.0, spread=0, rounds=1)
    assert worse([once], [{**once, "median_s": 1.2}]) == []
    assert worse([once], [{**once, "median_s": 1.5}]) == [("ours", "median_s")]


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_noise_alone_is_hardly_ever_worse(noise: float) -> None:
    """2000 pairs of runs that differ in nothing, five rounds, one in ten of them disturbed."""
    source = random.Random(0)

    def measured() -> dict:
        rounds = sorted(
            source.gauss(1, noise) + (source.random() < 0.1) * source.random() * 10 * noise
            for _ in range(5)
        )
        names = ("min_s", "q1_s", "median_s", "q3_s", "max_s")
        return {**row("ours", 1.0), **dict(zip(names, rounds, strict=True)), "rounds": 5}

    alarms = sum(bool(worse([measured()], [measured()])) for _ in range(2000))
    assert alarms < 2000 * 0.01
    found = sum(
        bool(worse([measured()], [{**b, "median_s": 1.2 * b["median_s"]}]))
        for b in (measured() for _ in range(2000))
    )
    assert found > 2000 * 0.9


def test_a_slower_machine_is_named_and_nobody_is_worse() -> None:
    stored = [*PEERS, row("ours", 0.03), row("ours-floor", 0.03, floor_share=0.8)]
    slower = [{**r, "median_s": 1.3 * r["median_s"]} for r in stored]
    found = compare(stored, slower)
    assert found.worse == []
    assert found.peers == []
    assert found.machine == {"loss": pytest.approx(1.3)}
    assert "took 1.30 times as long" in report(found, stored, slower)
    slower[-2]["median_s"] *= 1.2
    assert worse(stored, slower) == [("ours", "median_s")]


def test_what_alternated_with_the_floor_must_agree() -> None:
    stored = [row("ours", 0.03, floor_share=0.8)]
    assert worse(stored, [row("ours", 0.06, floor_share=0.8)]) == []  # the machine
    assert worse(stored, [row("ours", 0.03, floor_share=0.7)]) == []  # a faster floor
    assert worse(stored, [row("ours", 0.06)]) == [("ours", "median_s")]  # nothing to agree
    (change,) = compare(stored, [row("ours", 0.06, floor_share=0.5)]).worse
    assert (change.stored, change.now, change.ratio) == (0.03, 0.06, pytest.approx(1.6))


def test_what_alternated_with_the_peers_must_agree() -> None:
    stored = [
        row("ours", 0.1, times_ours=1.0),
        row("ours-other", 0.2, times_ours=2.0),
        row("slow", 0.4, times_ours=4.0),
        row("slower", 0.8, times_ours=8.0),
        row("slow", 0.4, times_ours=1.0, N=1),  # another problem
    ]
    machine = [{**r, "median_s": 3 * r["median_s"]} for r in stored[:2]] + stored[2:]
    assert worse(stored, machine) == []  # the peers' rows came when the machine was itself again
    regressed = [
        row("ours", 0.15, times_ours=1.0),
        row("ours-other", 0.2, times_ours=1.33),
        row("slow", 0.4, times_ours=2.67),
        row("slower", 0.8, times_ours=5.33),
        stored[-1],
    ]
    assert worse(stored, regressed) == [("ours", "median_s")]
    assert compare(stored, regressed).peers == []
    regressed[1] = row("ours-other", 0.3, times_ours=2.0)
    assert worse(stored, regressed) == [("ours", "median_s"), ("ours-other", "median_s")]


def test_memory_of_a_cpus_process_may_vary_more() -> None:
    before, after = (
        {**row("ours", 1.0, peak_mib=mib), "device": "some CPU, 2 of 2 cores"} for mib in (100, 160)
    )
    assert worse([before], [after]) == []
    assert worse([before], [{**after, "peak_mib": 166}]) == [("ours", "peak_mib")]


@pytest.mark.parametrize(
    ("fact", "stored", "same", "other"),
    [
        ("peak_mib", 1000, 1019, 1021),
        ("scratch_mib", 10.0, 13.9, 14.1),
        ("gradient_error", 0.002, 0.0025, 0.0026),
        ("divergence", 0.001, 0.00125, 0.0013),
        ("divergence", 0.0, 1e-5, 1.3e-5),
    ],
)
def test_memory_and_accuracy(fact: str, stored: float, same: float, other: float) -> None:
    before = [row("ours", 1.0, **{fact: stored})]
    assert worse(before, [row("ours", 1.0, **{fact: same})]) == []
    assert worse(before, [row("ours", 1.0, **{fact: other})]) == [("ours", fact)]
    assert worse(before, [row("ours", 1.0, **{fact: None})]) == []
    assert compare([row("ours", 1.0, **{fact: other})], before).better[0].fact == fact


def test_rows_that_come_and_go() -> None:
    stored = [*PEERS, row("ours", 1.0), row("ours", 1.0, head="frozen")]
    found = compare(stored, [*stored[1:4], row("ours", 1.0, head="other")])
    assert [(r["provider"], r["head"]) for r in found.vanished] == [
        ("trl", "trained"),
        ("ours", "frozen"),
    ]
    assert [r["head"] for r in found.new] == ["other"]
    text = report(found, stored, stored)
    assert "1 vanished" in text
    assert "vanished: loss: trl, 1 rows" in text
    assert "vanished: loss: ours, N 8192, frozen head (012345678)" in text


def test_the_latest_of_two_stored_rows_counts() -> None:
    old, new = row("ours", 1.0), row("ours", 2.0, date="2026-02-01")
    assert worse([new, old], [row("ours", 2.0)]) == []


def test_a_peer_that_is_slower_alone_is_told_and_not_ours_to_answer_for() -> None:
    now = [{**PEERS[0], "median_s": 0.1}, *PEERS[1:], row("ours", 1.0)]
    found = compare([*PEERS, row("ours", 1.0)], now)
    assert found.worse == []
    assert [(c.row["provider"], c.ratio) for c in found.peers] == [("trl", 2.0)]


def status(now: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    file = tmp_path / "run.json"
    rows_module.write(now, file)
    monkeypatch.setattr(sys, "argv", ["compare", str(file)])
    with pytest.raises(SystemExit) as end:
        module.main()
    return end.value.code


def test_the_exit_status_and_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(module, "RESULTS", results)
    stored = [*PEERS, row("ours", 1.0), row("ours", 1.0, question="step")]
    rows_module.write(stored, results / "loss-a.json")
    (results / "demo-a.json").write_text(json.dumps({"command": "make demo"}))
    loss = stored[:-1]
    assert status(loss, tmp_path, monkeypatch) == 0  # a run of one question
    assert capsys.readouterr().out.count("\n") == 1
    assert status([*PEERS, row("ours", 1.5)], tmp_path, monkeypatch) == 1
    out = capsys.readouterr().out
    assert "median_s         1       1.5   1.50  012345678  loss: ours, N 8192, trained" in out
    assert status([*PEERS], tmp_path, monkeypatch) == 1  # ours vanished
    assert status(loss[1:], tmp_path, monkeypatch) == 0  # a peer vanished
    assert status([], tmp_path, monkeypatch) == 1
    capsys.readouterr()
    assert status([{**loss[0], "device": "another"}], tmp_path, monkeypatch) == 2
    assert "nothing is stored for another, only for a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "no JSON"])
@pytest.mark.parametrize("main", [module.main, summary.main, designs.main])
def test_a_file_that_is_no_run_is_named(
    content: str | None,
    main: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    file = tmp_path / "run.json"
    if content:
        file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["command", str(file)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert f"must be the JSON of a run or of kept rows, got {file}" in capsys.readouterr().err


def test_a_run_of_everything_must_answer_every_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    stored = [row("ours", 1.0), row("ours", 1.0, question="step")]
    rows_module.write(stored, tmp_path / "all-a.json")
    profile = {"device": DEVICE, "model": "tiny", "rollout": {"wall_ms": 1.0}}
    rows_module.write([profile], tmp_path / "profile-a.json")  # nothing measures it again
    monkeypatch.setattr(sys, "argv", ["compare"])
    for now, failed, expected in (
        (stored, [], 0),
        (stored[:1], [], 1),
        (stored, ["bench_loss"], 1),
    ):
        file = tmp_path / "now" / "run.json"
        file.parent.mkdir(exist_ok=True)
        rows_module.write(now, file)
        measured = ([file], failed)
        monkeypatch.setattr(module.run, "measure", lambda _, measured=measured: measured)
        with pytest.raises(SystemExit) as end:
            module.main()
        assert end.value.code == expected, capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(rows_module.RESULTS.glob("*.json")), ids=lambda f: f.name)
def test_stored_results_can_be_compared(file: Path) -> None:
    rows = rows_module.read(file)
    found = compare(rows, rows)
    assert found.compared == len(rows)  # no two rows answer the same
    assert not found.worse
    if "median_s" in (rows or [{}])[0]:
        slower = [{**r, "median_s": 2 * r["median_s"], "floor_share": None} for r in rows]
        ours = [r for r in rows if rows_module.is_ours(r)]
        peers = [r for r in slower if not rows_module.is_ours(r)]
        assert len(compare(ours, [r for r in slower if r not in peers]).worse) == len(ours)
