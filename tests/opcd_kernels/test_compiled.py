"""The kernels' machine code, compiled ahead of time for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opcd_kernels.backends import DUAL_CAPABILITIES, DUAL_SHARED_BYTES

SMALL = ("sm_86", "sm_89", "sm_120")
# Bytes that a program may have (CUDA C++ Programming Guide; the CDNA 3 ISA).
SHARED_BYTES = {
    **{"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_120": 101_376},
    **{"sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536},
}
HERE = Path(__file__).parents[2]  # this code, whatever else is installed


@pytest.fixture(scope="module")
def reports(everything: list[dict]) -> list[dict]:
    """Of the kernel of the loss."""
    return [r for r in everything if r["kernel"] == "divergence_rows_kernel"]


@pytest.fixture(scope="module")
def attention(everything: list[dict]) -> list[dict]:
    """Of the kernel of the teacher's attention."""
    return [r for r in everything if r["kernel"] == "prefix_attention_kernel"]


@pytest.fixture(scope="module")
def dual(everything: list[dict]) -> list[dict]:
    """Of the kernel that multiplies both models."""
    return [r for r in everything if r["kernel"] == "dual_product_kernel"]


@pytest.fixture(scope="module")
def everything() -> list[dict]:
    """In a process of its own: here, Triton may be interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_kernels", "--json"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_configuration_is_compiled_for_every_architecture(reports: list[dict]) -> None:
    choices = ("architecture", "divergence", "gradient", "dz", "options", "targets")
    assert len({tuple(r[key] for key in choices) for r in reports}) == len(reports) == 4 * 28 + 3


def test_nothing_is_spilled(everything: list[dict]) -> None:
    measured = [r for r in everything if r["architecture"] in ("sm_80", "sm_90")]
    assert not [r for r in measured if r["local_bytes"] != 0]
    of_the_loss = [r for r in everything if r["kernel"] != "prefix_attention_kernel"]
    assert not [r for r in of_the_loss if r["local_bytes"] != 0]


def test_every_kernel_fits_the_shared_memory(everything: list[dict]) -> None:
    assert {r["architecture"] for r in everything} == set(SHARED_BYTES)
    for r in everything:
        assert r["shared_bytes"] <= SHARED_BYTES[r["architecture"]], r


def test_gpus_are_asked_for_the_shared_memory_that_the_dual_product_takes(dual: list[dict]) -> None:
    assert 0.98 * DUAL_SHARED_BYTES < max(r["shared_bytes"] for r in dual) <= DUAL_SHARED_BYTES
    for capability in DUAL_CAPABILITIES:
        assert SHARED_BYTES[f"sm_{10 * capability}"] >= DUAL_SHARED_BYTES


def test_attention_multiplies_with_matrix_instructions(attention: list[dict]) -> None:
    assert len(attention) == 7 * 3
    assert all(r["products"] > 0 for r in attention)


def test_both_models_are_multiplied_with_matrix_instructions(dual: list[dict]) -> None:
    assert len(dual) == 2 * 6
    assert all(r["products"] > 0 for r in dual)


def test_four_programs_fit_a_multiprocessor(reports: list[dict]) -> None:
    """65536 registers, 256 threads a program."""
    measured = [r for r in reports if r["architecture"] in ("sm_80", "sm_90")]
    assert max(r["registers"] for r in measured) <= 64


def test_a_thread_loads_16_bytes_at_once(reports: list[dict]) -> None:
    for r in reports:
        passes = 3 if r["divergence"] == "jsd" and r["gradient"] else 2
        assert r["wide_loads"] >= 2 * passes, r


def test_a_16_bit_gradient_waits_for_the_logits_it_overwrites(reports: list[dict]) -> None:
    def barriers(architecture: str, divergence: str, gradient: bool) -> int:
        (count,) = (
            r["barriers"]
            for r in reports
            if r["dz"] == "bf16"
            and not r["options"]
            and not r["targets"]
            and (r["architecture"], r["divergence"], r["gradient"])
            == (architecture, divergence, gradient)
        )
        return count

    for architecture in {r["architecture"] for r in reports}.difference(SMALL):
        with_gradient = barriers(architecture, "forward_kl", True)
        assert with_gradient == barriers(architecture, "forward_kl", False) + 1
