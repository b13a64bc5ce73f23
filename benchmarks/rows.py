"""What a benchmark found, as rows: one flat dictionary a provider and problem.

A row holds where it was measured (`device`, versions, `commit`, `date`), the `question` and the
`provider`, the seconds of its rounds, and the benchmark's own facts. Of those a float, whatever
carries a unit, and CHOSEN was found; the rest, and GIVEN, says which problem was solved.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger_kernel", "flash_attn")
WHERE = ("device", "python", *PACKAGES, "commit", "date", "question", "provider", "rounds")
TIMES = ("median", "min", "q1", "q3", "max")
UNITS = ("_s", "_mib", "_share", "_error")
GIVEN = ("kl", "beta", "temperature")
CHOSEN = ("micro_batch", "teacher")  # how each provider solved the problem
Row = dict


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


def on_cpu(row: Row) -> bool:
    """Whether memory is that of the whole process, which is not the same in every run."""
    return row["device"].endswith((" cores", " cores, AVX512-BF16"))


def versions() -> dict[str, str]:
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {package: installed[package] for package in PACKAGES if package in installed}


def machine() -> dict[str, str]:
    """What every row says of the machine it was measured on."""
    return {"device": device_name(), "python": platform.python_version(), **versions()}


def commit() -> str:
    """Of the code that is measured: of git, or where there is none as OPCD_COMMIT says."""
    if named := os.environ.get("OPCD_COMMIT"):
        return named
    try:
        found, changes = (
            subprocess.run(
                ["git", "-C", str(HERE), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found}+changes" if changes else found


@functools.cache
def origin() -> dict[str, str]:
    """The machine and the code of what is measured now."""
    return {**machine(), "commit": commit(), "date": datetime.date.today().isoformat()}


def read(file: Path) -> list[Row]:
    """Rows of a run or of a stored file; none of any other JSON."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        return []
    return [{"question": file.stem.split("-")[0], **row} for row in content]


def rows_of(argument: str) -> list[Row]:
    """`read` of a file that the command line names: a type for argparse."""
    try:
        return read(Path(argument))
    except (OSError, ValueError) as error:
        kinds = "the JSON of a run or of kept rows"
        raise argparse.ArgumentTypeError(f"must be {kinds}, got {argument}: {error}") from error


def write(rows: Iterable[Row], file: Path) -> None:
    """A row a line, so that a change to one is a change of one line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def facts(row: Row) -> dict[str, float | str | None]:
    """What was found besides the time."""
    times = {f"{key}_s" for key in TIMES}
    return {k: v for k, v in row.items() if _found(k, v) and k not in times}


def problem(row: Row) -> dict[str, object]:
    """What says which problem was solved."""
    return {k: v for k, v in row.items() if k not in WHERE and not _found(k, v)}


def _found(key: str, value: object) -> bool:
    if key in CHOSEN:
        return True
    return key not in GIVEN and (isinstance(value, float) or key.endswith(UNITS))


def provider(row: Row) -> str:
    return row.get("provider", row["question"])


def is_ours(row: Row) -> bool:
    """Whether this repository answers for the row, and not a peer."""
    return provider(row).startswith("ours") or "provider" not in row


def case(row: Row) -> str:
    """The problem in words."""
    return words(problem(row))


def words(problem: dict[str, object]) -> str:
    """`N 1024, trained head` of {"N": 1024, "head": "trained"}."""
    phrases = {"head": "{} head", "lengths": "{} lengths", "new_tokens": "{} new tokens"}
    phrases |= {"model": "{}", "dtype": "{}", "divergence": "{}", "call": "{}"}
    phrases |= {"hidden": "{} hidden states"}
    return ", ".join(phrases.get(k, k + " {}").format(v) for k, v in problem.items())


def cases(rows: Iterable[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    """Rows of one question and problem together, in the order they were measured."""

    def key(row: Row) -> tuple[str, str]:
        return row["question"], case(row)

    rows = list(rows)
    order = {k: i for i, k in enumerate(dict.fromkeys(map(key, rows)))}
    return [(k, list(g)) for k, g in groupby(sorted(rows, key=lambda r: order[key(r)]), key)]
