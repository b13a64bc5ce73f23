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

pytestmark = pytest.mark.timeout(900)  # one fixture compiles all: 60 to 300 s


@pytest.fixture(scope="module")
def reports(everything: list[dict]) -> list[dict]:
    """Of the kernel of the loss, where V is a multiple of 16."""
    rows = [r for r in everything if r["kernel"] == "divergence_rows_kernel"]
    return [r for r in rows if "odd V" not in r["divergence"]]


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
    attention = [r for r in everything if r["kernel"] == "prefix_attention_kernel"]
    assert not [
        r for r in attention if r["local_bytes"] != 0 and r["architecture"] in ("sm_80", "sm_90")
    ]
    of_the_loss = [r for r in everything if r not in attention]
    spilled = [r for r in of_the_loss if r["local_bytes"] != 0]
    # With biases and softcaps, two numbers of a thread: a mixture on sm_100, an odd V on sm_90.
    assert all(r["options"] and r["local_bytes"] <= 8 for r in spilled), spilled
    assert len(spilled) <= 2


def test_logits_are_rounded_before_their_maximum_is_taken_off(reports: list[dict]) -> None:
    """Or the largest one, of two roundings, would not come to 0 with a temperature."""
    assert {r["fused"] for r in reports if r["architecture"].startswith("sm_")} == {0}


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


def test_a_logit_takes_one_exponential_in_each_pass(reports: list[dict]) -> None:
    """Four entries of two models a thread, in two passes and where lanes merge; one for the row."""
    plain = [
        r
        for r in reports
        if (r["divergence"], r["options"], r["targets"]) == ("reverse_kl", False, False)
        and r["architecture"] in ("sm_80", "sm_90")
    ]
    assert len(plain) == 4
    for r in plain:
        assert 3 * 4 * 2 <= r["exponentials"] <= 3 * 4 * 2 + 1, r


def test_no_gradient_is_stored_two_bytes_at_a_time(everything: list[dict]) -> None:
    rows = [r for r in everything if r["kernel"] == "divergence_rows_kernel" and r["gradient"]]
    nvidia = [r for r in rows if r["architecture"].startswith("sm_")]
    odd = [r for r in nvidia if "odd V" in r["divergence"]]
    assert len(odd) == 2 * 5
    for r in nvidia:
        assert r["half_stores"] == 0, r
        assert r["wide_stores"] >= 2, r  # of rows that count, and of those that do not


def test_only_a_target_waits_for_other_warps(reports: list[dict]) -> None:
    """Its logit may be overwritten by another warp's gradient; other logits are a thread's own."""
    for r in reports:
        assert r["asked_barriers"] == (1 if r["targets"] else 0), r
