"""Is anything worse than the results that are stored for this device? Made for a nightly run.

    python -m benchmarks.compare                # runs every benchmark first
    python -m benchmarks.compare RUN.json...    # takes a run, or rows that were kept

Exit status 0: nothing; 1: something, named in a table, or a benchmark failed; 2: there is nothing
to compare, as nothing is stored for this device or a file is no run. (make always says 2 for both.)

Time. Medians count, and differ when they are apart by more than 5 % and by four standard errors of
their difference, which come from the quartiles of both runs' rounds. A machine can be slower today,
so a change must show in two ways: in the time, divided by the median change of the peers' times of
the question, and in what was measured in alternation, where rows have it: `floor_share`, or
`times_ours` of the peers that solve the same problem. The smaller change of the two is told.

Memory: more than 2 %, and more than 4 MiB; on a CPU, where the whole process is measured, 50 % and
64 MiB, so that little but a copy of the logits shows. Accuracy: an error or divergence above 1.25
times the stored one. A row of ours that is gone may have become wrong, and counts as worse. The
peers are the yardstick: what is worse with them is told, but does not change the status.
"""

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks import run
from benchmarks.rows import (
    PACKAGES,
    RESULTS,
    Row,
    case,
    facts,
    is_ours,
    on_cpu,
    problem,
    provider,
    read,
    rows_of,
)

TIME, ACCURACY = 0.05, 0.25  # changes that count, relative
MEMORY, MEMORY_MIB = 0.02, 4  # and in MiB; a GPU's allocator repeats itself
CPU_MEMORY, CPU_MEMORY_MIB = 0.5, 64  # a process does not: 96 to 146 MiB in five runs
STANDARD_ERRORS = 4  # of the difference of two medians
ACCURACY_NOISE = 1e-5  # an error that rounding alone makes
PEERS = 3  # that many say how fast the machine is
# The mean range of n normal rounds, in standard deviations.
RANGES = {2: 1.13, 3: 1.69, 4: 2.06, 5: 2.33, 6: 2.53, 7: 2.70, 8: 2.85, 9: 2.97}
ONE_ROUND = 0.05  # the relative standard deviation that is assumed where there is one round


class Change(NamedTuple):
    """One fact of one row, then and now."""

    row: Row  # the stored one
    fact: str
    stored: float
    now: float
    ratio: float  # above 1 is worse; of times the smaller one of two, see above


class Comparison(NamedTuple):
    """What `compare` found; the peers' rows are among `peers`, all others are ours."""

    compared: int
    worse: list[Change]
    better: list[Change]
    peers: list[Change]  # worse or better
    vanished: list[Row]  # stored, not measured now
    new: list[Row]  # measured now, not stored
    machine: dict[str, float]  # times the peers took as long, by question


def compare(stored: Iterable[Row], now: Iterable[Row]) -> Comparison:
    """Hold rows against stored rows of the same device; the latest where several are stored."""
    then = {_key(row): row for row in sorted(stored, key=lambda row: row.get("date", ""))}
    today = {_key(row): row for row in now}
    pairs = [(then[key], row) for key, row in today.items() if key in then]
    machine, beside = _machine(pairs), _beside_peers(pairs)
    changes = []
    for before, after in pairs:
        in_time = after["median_s"] / before["median_s"] if "median_s" in after else 1
        ratios = [in_time / machine.get(after["question"], 1)]
        ratios += _alternating(before, after, beside.get(_problem_key(after)))
        changes += _changes(before, after, _smaller(ratios))
    ours = [c for c in changes if is_ours(c.row)]
    return Comparison(
        compared=len(pairs),
        worse=[c for c in ours if c.ratio > 1],
        better=[c for c in ours if c.ratio < 1],
        peers=[c for c in changes if not is_ours(c.row)],
        vanished=[row for key, row in then.items() if key not in today],
        new=[row for key, row in today.items() if key not in then],
        machine=machine,
    )


def _key(row: Row) -> tuple:
    return provider(row), *_problem_key(row)


def _problem_key(row: Row) -> tuple:
    return row["question"], *sorted((k, str(v)) for k, v in problem(row).items())


def _machine(pairs: list[tuple[Row, Row]]) -> dict[str, float]:
    ratios: dict[str, list[float]] = {}
    for then, now in pairs:
        if "median_s" in now and not is_ours(now):
            ratios.setdefault(now["question"], []).append(now["median_s"] / then["median_s"])
    return {q: statistics.median(r) for q, r in ratios.items() if len(r) >= PEERS}


def _beside_peers(pairs: list[tuple[Row, Row]]) -> dict[tuple, float]:
    """By problem, times as long as ours takes now beside the peers."""
    ratios: dict[tuple, list[float]] = {}
    for then, now in pairs:
        if then.get("times_ours") and now.get("times_ours") and not is_ours(now):
            ratios.setdefault(_problem_key(now), []).append(then["times_ours"] / now["times_ours"])
    return {key: statistics.median(r) for key, r in ratios.items()}


def _alternating(then: Row, now: Row, beside_peers: float | None) -> list[float]:
    """Times as long as stored, from what was measured in alternation; at most one."""
    if then.get("floor_share") and now.get("floor_share"):
        return [then["floor_share"] / now["floor_share"]]
    if beside_peers and then.get("times_ours") and now.get("times_ours"):
        return [beside_peers * now["times_ours"] / then["times_ours"]]
    return []


def _smaller(ratios: list[float]) -> float:
    """The smaller change of those that agree whether it is slower; 1 where they do not."""
    if min(ratios) > 1:
        return min(ratios)
    return max(ratios) if max(ratios) < 1 else 1.0


def _changes(then: Row, now: Row, slower: float) -> Iterator[Change]:
    """The facts that differ beyond their noise; the time is `slower` times as long as stored."""
    if "median_s" in now:
        error = math.hypot(_standard_error(then), _standard_error(now))
        if max(slower, 1 / slower) > 1 + max(TIME, STANDARD_ERRORS * error):
            yield Change(then, "median_s", then["median_s"], now["median_s"], slower)
    share, mib = (CPU_MEMORY, CPU_MEMORY_MIB) if on_cpu(now) else (MEMORY, MEMORY_MIB)
    for fact, b in facts(now).items():
        a = facts(then).get(fact)
        if a is None or b is None:
            continue
        if fact.endswith("_mib") and abs(b - a) > max(mib, share * min(a, b)):
            yield Change(then, fact, a, b, max(b, mib) / max(a, mib))
        if fact.endswith("_error") or fact == "divergence":
            ratio = max(b, ACCURACY_NOISE) / max(a, ACCURACY_NOISE)
            if max(ratio, 1 / ratio) > 1 + ACCURACY:
                yield Change(then, fact, a, b, ratio)


def _standard_error(row: Row) -> float:
    """Of the median of the rounds, relative to it."""
    n, median = row["rounds"], row["median_s"]
    if n == 1:
        deviation = ONE_ROUND
    elif n >= 5 and "q1_s" in row:  # quartiles do not mind a disturbed round
        deviation = (row["q3_s"] - row["q1_s"]) / 1.349 / median
    else:
        deviation = (row["max_s"] - row["min_s"]) / RANGES[min(n, max(RANGES))] / median
    return 1.2533 * deviation / math.sqrt(n)


def report(found: Comparison, then: list[Row], now: list[Row]) -> str:
    """One line where there is nothing to say."""
    lost = [row for row in found.vanished if is_ours(row)]
    verdict = f"{len(found.worse)} worse, {len(lost)} vanished" if found.worse or lost else "clean"
    lines = [
        f"{verdict}: {found.compared} rows compared, {len(found.better)} facts better, "
        f"{len(found.new)} rows new"
    ]
    for question, factor in found.machine.items():
        if abs(math.log(factor)) > TIME:
            lines.append(
                f"the machine: the peers of {question!r} took {factor:.2f} times as long as "
                f"stored; times are divided by that"
            )
    for package in PACKAGES:
        before, after = ({row[package] for row in rows if package in row} for rows in (then, now))
        if before and after and before != after:
            lines.append(f"{package} {', '.join(sorted(before))} → {', '.join(sorted(after))}")
    parts = {"worse": found.worse, "better": found.better, "peers": found.peers}
    for name, changes in parts.items():
        lines += _table(name, changes)
    lines += [f"vanished: {_name(row)} ({_commit(row)})" for row in lost]
    peers = Counter(f"{r['question']}: {provider(r)}" for r in found.vanished if not is_ours(r))
    lines += [f"vanished: {name}, {count} rows" for name, count in peers.items()]
    return "\n".join(lines)


def _table(name: str, changes: list[Change]) -> list[str]:
    if not changes:
        return []
    lines = [f"{name:7} {'fact':>15} {'stored':>9} {'now':>9} {'ratio':>6}  {'commit':10} case"]
    for c in sorted(changes, key=lambda c: -abs(math.log(c.ratio))):
        numbers = f"{c.stored:9.4g} {c.now:9.4g} {c.ratio:6.2f}"
        lines.append(f"{'':7} {c.fact:>15} {numbers}  {_commit(c.row):10} {_name(c.row)}")
    return lines


def _name(row: Row) -> str:
    return f"{row['question']}: {provider(row)}, {case(row)}"


def _commit(row: Row) -> str:
    commit, plus, _ = row.get("commit", "unknown").partition("+")
    return commit[:9] + plus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=rows_of, nargs="*", help="a run, or rows that were kept")
    arguments = parser.parse_args()
    runs, failed = arguments.runs, []
    if not runs:
        files, failed = run.measure([])
        runs = map(read, files)
    now = [row for rows in runs for row in rows]
    if not now:
        parser.exit(1, "nothing was measured: see why the benchmarks were skipped above\n")
    # Kept profiles and tunings name no provider: no run measures them again.
    rows = (row for file in sorted(RESULTS.glob("*.json")) for row in read(file))
    kept = [row for row in rows if "provider" in row]
    device = now[-1]["device"]
    then = [row for row in kept if row["device"] == device]
    if not then:
        others = ", ".join(sorted({row["device"] for row in kept})) or "no device"
        message = f"nothing is stored for {device}, only for {others}; make bench SAVE=name keeps"
        parser.exit(2, f"{message} a run\n")
    if arguments.runs:  # a run may answer one question alone
        then = [row for row in then if row["question"] in {row["question"] for row in now}]
    found = compare(then, now)
    print(report(found, then, now))
    bad = found.worse or failed or any(map(is_ours, found.vanished))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
