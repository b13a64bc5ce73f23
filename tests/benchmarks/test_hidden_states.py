"""Hidden states of a run are those that its loss is computed from."""

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import bench_loss
from benchmarks.bench_loss import MAIN, Case, cases
from benchmarks.hidden_states import ROOT, outside, record, recorded, recorded_steps
from benchmarks.providers import PROVIDERS, gradients

CPU = torch.device("cpu")
bench_loss.test_loss.__test__ = False


@pytest.fixture
def file(settings: dict, tmp_path: Path) -> Path:
    found = record(settings | {"dtype": "bfloat16"}, None, [0, 2])
    save_file(found, tmp_path / "hidden.safetensors", metadata={"steps": "0 2"})
    return tmp_path / "hidden.safetensors"


def test_steps_are_kept_with_their_sizes(file: Path) -> None:
    found = recorded_steps(file)
    assert list(found) == ["step 0", "step 2"]
    for n, d, v in found.values():
        assert 4 <= n <= 4 * 8
        assert (d, v) == (32, 258)
    assert recorded_steps(None) == {}


def test_what_is_kept_is_what_the_loss_was_given(file: Path) -> None:
    """The context alone is between the models before the first step; after two they learned."""
    first, second = (recorded(file, step, CPU) for step in ("step 0", "step 2"))
    assert torch.equal(first[1], first[3])
    assert torch.equal(first[3], second[3])
    assert not torch.equal(second[1], second[3])
    losses = [gradients(PROVIDERS["ours-torch"](CPU, "reverse_kl"), x)[0] for x in (first, second)]
    assert losses[0] > 0.01
    assert losses[1] < losses[0]


def test_the_benchmark_has_a_case_a_step(file: Path) -> None:
    found = cases([256], file)
    assert found[0] == MAIN
    hidden = [case for case in found if case.hidden != "gaussian"]
    assert [case.hidden for case in hidden] == ["step 0", "step 2"]
    assert hidden[0][:3] == recorded_steps(file)["step 0"]
    assert str(hidden[0]).endswith("x32x258-trained-reverse_kl-alone-step_0")
    assert {case.divergence for case in found} == {"reverse_kl", "forward_kl", "jsd", "mixture"}
    assert MAIN._replace(call="in a step") in found
    assert MAIN._replace(n=256) in found


def test_cases_have_names_of_their_own() -> None:
    for tokens in ([256, MAIN.n, 65536], bench_loss.SWEEP):
        names = [str(case) for case in cases(tokens, None)]
        assert len(set(names)) == len(names)
    assert isinstance(cases([8], None)[-1], Case)


def test_weights_stay_out_of_the_repository(tmp_path: Path) -> None:
    assert outside(str(tmp_path / "x.safetensors")) == tmp_path / "x.safetensors"
    for wrong in (ROOT / "x.safetensors", tmp_path / "x.pt"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"must be a .* got .*; pass"):
            outside(str(wrong))
