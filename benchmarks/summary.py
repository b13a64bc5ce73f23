"""What a benchmark run found, for people: rows, a table, a plot.

    python -m benchmarks.summary RUN.json                # prints the table
    python -m benchmarks.summary RUN.json --save NAME    # keeps rows and plot in results/

RUN.json comes from `pytest --benchmark-json`. A row holds the device, versions, commit, the
benchmark's own facts (`extra_info`) and the seconds of its rounds; `results/QUESTION-NAME.json` is
a list of such rows, the SVG beside it draws the medians.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from itertools import groupby
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger_kernel", "flash_attn")
CASE = (
    "N",
    "D",
    "V",
    "head",
    "P",
    "B",
    "lengths",
    "dtype",
)  # facts that say which problem was solved
FACTS = (
    *("scratch_mib", "peak_mib", "prefix_mib", "gradient_error", "divergence"),
    *("floor_share", "times_ours"),
)


def device_name() -> str:
    """The GPU, or the CPU with the cores that PyTorch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    bf16 = ", AVX512-BF16" if "avx512_bf16" in " ".join(lines) else ""
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} cores{bf16}"


def versions() -> dict[str, str]:
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {package: installed[package] for package in PACKAGES if package in installed}


def rows_of(run: dict) -> list[dict]:
    """One flat row a benchmark."""
    commit = run["commit_info"]
    shared = {
        "device": device_name(),
        "python": platform.python_version(),
        **versions(),
        "commit": commit["id"] + ("+changes" if commit["dirty"] else ""),
        "date": run["datetime"][:10],
    }
    rows = []
    for benchmark in run["benchmarks"]:
        stats = benchmark["stats"]
        times = {f"{key}_s": float(f"{stats[key]:.4g}") for key in ("median", "min", "max")}
        facts = {"question": benchmark["name"], **benchmark["extra_info"]}
        rows.append({**shared, **facts, **times, "rounds": stats["rounds"]})
    return rows


def case(row: dict) -> str:
    """The problem in words."""
    words = {"head": "{} head", "lengths": "{} lengths"}
    return ", ".join(words.get(k, k + " {}").format(row[k]) for k in CASE if k in row)


def cases(rows: list[dict]) -> list[tuple[tuple[str, str], list[dict]]]:
    """Rows of one question and problem together, in the order they were measured."""

    def key(row: dict) -> tuple[str, str]:
        return row["question"], case(row)

    order = {k: i for i, k in enumerate(dict.fromkeys(map(key, rows)))}
    return [(k, list(g)) for k, g in groupby(sorted(rows, key=lambda r: order[key(r)]), key)]


def table(rows: list[dict]) -> str:
    lines = [", ".join(str(rows[0][k]) for k in ("device", "commit", "date"))]
    for (question, name), group in cases(rows):
        facts = [k for k in FACTS if any(row.get(k) is not None for row in group)]
        lines += ["", f"{question}: {name}"]
        lines.append("  ".join([f"{'':18}", "median_s", *(f"{k:>14}" for k in facts)]))
        for row in group:
            cells = ("" if row.get(k) is None else str(row[k]) for k in facts)
            label = row.get("provider", row["question"])
            lines.append(
                "  ".join([f"{label:18}", f"{row['median_s']:8.4g}", *(f"{c:>14}" for c in cells)])
            )
    return "\n".join(lines)


def draw(rows: list[dict], file: Path) -> None:
    """Median, and minimum to maximum, a panel a problem."""
    groups = cases(rows)
    figure, panels = plt.subplots(
        len(groups), 1, figsize=(8, 0.9 + 0.42 * len(rows)), squeeze=False, layout="constrained"
    )
    for panel, ((_, name), group) in zip(panels[:, 0], groups, strict=True):
        labels = [row.get("provider", row["question"]) for row in group]
        medians = [row["median_s"] for row in group]
        spread = [
            [row["median_s"] - row["min_s"] for row in group],
            [row["max_s"] - row["median_s"] for row in group],
        ]
        colors = ["#1f6f5c" if label.startswith("ours") else "#b9b4a8" for label in labels]
        panel.barh(labels, medians, xerr=spread, color=colors, ecolor="#55524a", height=0.7)
        for i, row in enumerate(group):
            if "gradient_error" in row:
                note = f" gradient error {row['gradient_error']:.1%}"
                panel.text(row["max_s"], i, note, va="center", fontsize=7, color="#55524a")
        panel.set_xlim(0, 1.25 * max(row["max_s"] for row in group))
        panel.invert_yaxis()
        panel.set_title(name, loc="left", fontsize=9)
        panel.set_xlabel("seconds: median, and from the fastest to the slowest round", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(rows[0]["device"], x=0.01, ha="left", fontsize=9)
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="from pytest --benchmark-json")
    parser.add_argument("--save", metavar="NAME", help="keep rows and plots in results/")
    arguments = parser.parse_args()
    rows = rows_of(json.loads(arguments.run.read_text(encoding="utf-8")))
    if not rows:
        parser.exit(1, "nothing was measured: see why the benchmarks were skipped above\n")
    print(table(rows))
    if arguments.save:
        for question in dict.fromkeys(row["question"] for row in rows):
            chosen = [row for row in rows if row["question"] == question]
            file = RESULTS / f"{question}-{arguments.save}.json"
            lines = ",\n".join(json.dumps(row) for row in chosen)
            file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
            draw(chosen, file.with_suffix(".svg"))
            print(f"\nwritten: {file} and its plot")


if __name__ == "__main__":
    main()
