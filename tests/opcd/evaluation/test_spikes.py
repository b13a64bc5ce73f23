"""Steps that stand out from those before them."""

from opcd.evaluation.spikes import FEWEST, LEAST, Spike, spikes


def rows(*divergences: float | None, **more: object) -> list[dict]:
    return [{"step": i, "divergence": x, **more} for i, x in enumerate(divergences, 1)]


def test_a_step_above_five_times_the_median_before_it() -> None:
    calm = [0.05, 0.06] * 10
    assert spikes(rows(*calm, 0.31, 0.05)) == [Spike(21, 0.31, 0.055)]
    assert spikes(rows(*calm, 0.27, 0.05)) == []


def test_the_median_follows_a_divergence_that_falls() -> None:
    """0.6 is no spike where a run begins, and one twenty steps later."""
    assert spikes(rows(*[1.0] * 20, 0.6)) == []
    assert spikes(rows(*[1.0] * 20, *[0.1] * 11, 0.6)) == [Spike(32, 0.6, 0.1)]


def test_few_steps_and_small_divergences_tell_nothing() -> None:
    assert spikes(rows(*[0.05] * (FEWEST - 1), 9.0)) == []
    assert spikes(rows(*[0.05] * FEWEST, 9.0)) == [Spike(FEWEST + 1, 9.0, 0.05)]
    assert spikes(rows(*[0.001] * 20, LEAST)) == []


def test_steps_without_completions_of_the_students_own() -> None:
    """Left out where there are others; where there are none, what is minimised counts."""
    some = rows(*[0.1] * 20, None, 0.9, guided_loss=0.2)
    assert spikes(some) == [Spike(22, 0.9, 0.1)]
    none = rows(*[None] * 21)
    for row in none:
        row["guided_loss"] = 0.1 if row["step"] < 21 else 0.8
    assert spikes(none) == [Spike(21, 0.8, 0.1)]
    assert spikes([{"step": 0, "validation": {"divergence": 9.0}}]) == []
