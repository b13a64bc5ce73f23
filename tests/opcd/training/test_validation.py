"""Which validation is the better one."""

from opcd.training.validation import rank


def test_which_validation_is_better() -> None:
    best_first = [
        {"accuracy": 0.6, "gap": 0.2},
        {"accuracy": 0.6, "gap": 0.3},
        {"accuracy": 0.6, "divergence": 0.01},  # of a version before
        {"accuracy": 0.5, "gap": 0.1},
    ]
    assert sorted(best_first, key=rank) == best_first[::-1]
    assert rank({"gap": 0.2}) > rank({"gap": 0.3})
