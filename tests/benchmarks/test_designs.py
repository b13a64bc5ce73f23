"""The choice between the designs follows what was measured."""

from typing import Any

import torch

from benchmarks.designs import designs, merged
from opcd_kernels.backends import chosen_backend, fastest, measurements


def row(provider: str, n: int, d: int, seconds: float, device: str = "X") -> dict[str, Any]:
    facts = {"device": device, "head": "trained", "commit": "c", "date": "2026-01-01"}
    return {**facts, "provider": provider, "N": n, "D": d, "V": 1000, "median_s": seconds}


ROWS = [
    row("ours-triton", 64, 576, 3.0),
    row("ours-triton-dual", 64, 576, 2.0),
    row("plain", 64, 576, 1.0),
    row("ours-triton", 512, 576, 0.1),
    row("ours-triton", 64, 4096, 5.0),
    row("ours-triton-dual", 64, 4096, 6.0),
    row("ours-triton", 64, 9999, 1.0),  # alone
    {"question": "accuracy", "provider": "ours-triton", "D": 576, "V": 1000},
    {"question": "tune", "tile": "library"},
]


def test_a_row_needs_every_design_and_takes_the_fewest_tokens() -> None:
    table = designs(ROWS[::-1])
    assert [(r["D"], r["N"]) for r in table] == [(4096, 64), (576, 64)]
    assert table[1]["seconds"] == {"triton": 3.0, "triton_dual": 2.0}


def test_what_was_not_measured_anew_stays() -> None:
    new = designs(ROWS)
    others = [{**new[0], "device": "Y"}, {**new[0], "D": 8192}, {**new[0], "head": "frozen"}]
    table = [*others, {**new[0], "date": "2025-01-01"}]
    assert merged(table, new) == [*others, *new]


def test_the_nearest_shape_of_the_device_decides() -> None:
    table = tuple(designs(ROWS))
    assert fastest(table, "X", (1000, 700), "trained") == "triton_dual"
    assert fastest(table, "X", (1200, 8192), "trained") == "triton"
    assert fastest(table, "X", (1000, 700), "frozen") == "triton"  # not measured
    assert fastest(table, "Y", (1000, 700), "trained") == "triton"


def test_the_table_in_the_package_can_be_read() -> None:
    for r in measurements():
        shape = r["V"], r["D"]
        assert fastest((r,), r["device"], shape, r["head"]) == min(
            r["seconds"], key=r["seconds"].get
        )


def test_a_cpu_takes_pytorch() -> None:
    cpu = torch.device("cpu")
    assert chosen_backend(cpu, torch.bfloat16, True, (1000, 64), "trained") == "torch"
