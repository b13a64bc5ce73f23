"""The benchmark of the loss says what a machine cannot do, and goes on."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy, bench_loss, rates
from benchmarks.bench_loss import Case, test_loss
from benchmarks.providers import Inputs, Provider, Unavailable, exact_gradients, tensors
from benchmarks.rounds import Rounds

test_loss.__test__ = False
CPU = torch.device("cpu")
CASE = Case(12, 8, 64)


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> Inputs:
    monkeypatch.setattr(bench_loss, "MAIN", CASE)
    monkeypatch.setattr(bench_loss, "DEVICE", CPU)
    monkeypatch.setattr(bench_loss, "ON_GPU", False)
    monkeypatch.setattr(bench_loss, "BASELINE", "ours-torch")
    monkeypatch.setattr(rates, "measured", lambda device: rates.Rates(1e12, 1e10))
    return tensors(12, 8, 64, CPU)


@pytest.mark.parametrize("call", ["alone", "in a step"])
def test_a_row_has_its_case_its_floors_and_its_error(inputs: Inputs, call: str) -> None:
    rounds = Rounds()
    case = CASE._replace(call=call)
    test_loss(rounds, "ours-torch", case, inputs, lambda: exact_gradients(inputs, "reverse_kl"))
    row = rounds.row()
    assert (row["N"], row["divergence"], row["call"], row["hidden"]) == (
        *(12, "reverse_kl", call),
        "gaussian",
    )
    assert 0 < row["gradient_error"] < 0.005
    assert min(row["floor_share"], row["times_ours"]) > 0
    assert row["rates_floor_share"] >= 0
    assert row["sheet_floor_share"] is None  # of a CPU nobody promised anything


def test_one_of_ours_that_is_wrong_is_not_timed(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = bench_loss.PROVIDERS["ours-torch"]

    def wrong(device: torch.device, divergence: str) -> Provider:
        right = make(device, divergence)
        return right._replace(loss=lambda *tensors: 1.01 * right.loss(*tensors))

    monkeypatch.setitem(bench_loss.PROVIDERS, "ours-torch", wrong)
    rounds, exact = Rounds(), exact_gradients(inputs, "reverse_kl")
    with pytest.raises(AssertionError, match="not timed"):
        test_loss(rounds, "ours-torch", CASE, inputs, lambda: exact)
    assert not rounds.seconds


def test_an_oracle_that_does_not_fit_skips(inputs: Inputs) -> None:
    def too_large() -> list[torch.Tensor]:
        raise torch.OutOfMemoryError

    with pytest.raises(pytest.skip.Exception, match="out of memory"):
        test_loss(Rounds(), "ours-torch", CASE, inputs, too_large)


def test_who_cannot_run_is_skipped_with_the_reason(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise ValueError("backend 'triton_dual' must have a GPU of another kind")

    monkeypatch.setattr("benchmarks.providers.check_backend", refused)
    with pytest.raises(pytest.skip.Exception, match="of another kind"):
        test_loss(Rounds(), "ours-triton-dual", CASE, inputs, list)


def test_a_provider_that_fails_leaves_the_table_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def make(device: torch.device, divergence: str) -> Provider:
        def loss(*_: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("out of resources: shared memory")

        return Provider(loss)

    def absent(device: torch.device, divergence: str) -> Provider:
        raise Unavailable("needs a Hopper")

    monkeypatch.setitem(accuracy.PROVIDERS, "trl", make)
    monkeypatch.setitem(accuracy.PROVIDERS, "ours-triton-dual", absent)
    monkeypatch.setattr(accuracy, "D", 16)
    monkeypatch.setattr(accuracy, "V", 200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "accuracy.json"
    only = ["trl", "ours-triton-dual", "ours-torch", "ours-torch-jsd", "plain-bf16"]
    command = ["accuracy", "--json", str(file), "--kl", "0.04", "--only", *only]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="failed: trl"):
        accuracy.main()
    rows = json.loads(file.read_text())
    assert [row["provider"] for row in rows] == ["ours-torch", "plain-bf16", "ours-torch-jsd"]
    errors = [row["gradient_error"] for row in rows]
    assert max(errors[0], errors[2]) < 0.005 < errors[1]
    said = capsys.readouterr()
    assert "ours-triton-dual: needs a Hopper" in said.out
    assert "out of resources" in said.err
    assert "| ours-torch | " in said.out
