"""The simulated roundings are those that the derivation speaks of."""

import pytest

from benchmarks.roundings import differences, inputs, stored


@pytest.mark.parametrize("noise", [0.35, 0.012])
def test_storing_costs_less_than_rounding_the_gradient(noise: float) -> None:
    kl, of_stored, of_gradient, of_both = stored(*inputs(64, 1024, noise))
    assert kl > 1e-4
    assert 1e-4 < of_stored < of_gradient < of_both < 0.003


def test_the_difference_of_hidden_states_pays_only_where_the_models_are_one() -> None:
    _, of_difference, of_rounded = differences(*inputs(64, 1024, 0.1))
    assert of_difference < 1e-5 < of_rounded
    _, of_difference, of_rounded = differences(*inputs(64, 1024, 1e-4))
    assert of_rounded < of_difference
