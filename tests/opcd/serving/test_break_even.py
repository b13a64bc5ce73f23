"""Break-even and verdict, by hand and by what a server was measured to take."""

import json
import math
from pathlib import Path

import pytest

from opcd.serving.break_even import Counted, Prices, break_even, priced, verdict
from opcd.serving.spread import Spread

MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "serving-cpu.json"
MORE, LESS = Spread(0.10, 0.09, 0.12, 3), Spread(0.04, 0.03, 0.05, 3)


def counted(training: float | None = 61.3, more: Spread = MORE, less: Spread = LESS) -> Counted:
    return Counted("s", more, less, training, ["from here"])


def test_a_run_pays_after_its_seconds_over_those_that_are_saved() -> None:
    found = break_even(counted(), requests_a_day=500)
    assert found.saved == pytest.approx((0.06, 0.04, 0.09, 3))
    assert (found.requests, found.most_requests, found.days) == (1022, 1533, 1022 / 500)
    assert found.saves
    text = "\n".join(found.lines)
    assert text.startswith("from here\nsaved a request 0.06 (0.04 to 0.09) s of the device")
    assert "training / saved = 61.3 / 0.06 = 1,022 requests (at most 1,533)" in text
    assert "2.04 days at 500 requests a day" in text


def test_where_rounds_differ_by_as_much_nothing_is_saved_for_certain() -> None:
    found = break_even(counted(more=Spread(0.052, 0.045, 0.06, 3)))
    assert not found.saves
    assert found.requests == 5109
    assert found.most_requests is None
    assert "or never, as rounds differ by as much" in found.lines[-1]
    decided = verdict("learned", found)
    assert decided.word == "keep the prompt"
    assert "no more than rounds differ by" in decided.reason


def test_where_nothing_is_saved_training_never_pays() -> None:
    found = break_even(counted(more=LESS, less=MORE), 500)
    assert (found.requests, found.days) == (None, None)
    assert "never pays" in found.lines[-1]
    assert verdict("learned", found).word == "keep the prompt"


def test_training_on_another_device_has_no_figure() -> None:
    found = break_even(counted(None), 500)
    assert (found.requests, found.most_requests) == (None, None)
    decided = verdict("learned", found)
    assert decided.word == "drop the prompt"
    assert "what training cost is not known" in decided.reason
    decided = verdict("learned", found, expected_requests=10)
    assert decided.word == "not known"
    assert "--price-hour" in decided.advice


def test_one_round_says_nothing_of_how_rounds_differ() -> None:
    once = break_even(counted(more=Spread(0.1, 0.1, 0.1, 1)))
    decided = verdict("learned", once)
    assert decided.word == "not known"
    assert "in one round alone" in decided.reason
    assert verdict("not learned", once).word == "keep the prompt"


def test_prices_of_an_api() -> None:
    made = priced(Prices(2.0, 0.5, hour=3.6), 1000, 800, 100, 1000.0)
    assert made.prompted.median == pytest.approx((200 * 2.0 + 800 * 0.5) / 1e6)
    assert made.distilled.median == pytest.approx(100 * 2.0 / 1e6)
    assert made.training == pytest.approx(1.0)
    found = break_even(made)
    assert found.requests == math.ceil(1 / 0.0006)
    assert "(200 tokens x 2 + 800 cached x 0.5) / 1,000,000 = 0.0008 a request" in found.lines[0]
    assert priced(Prices(2.0, 0.5), 1000, 800, 100, 1000.0).training is None
    # Where cached tokens cost next to nothing, and the rest of the prompt is short, as on demos.
    dear = priced(Prices(1.0, 0.0), 140, 100, 50, None)
    assert verdict("learned", break_even(dear)).word == "keep the prompt"


@pytest.mark.parametrize(
    ("learned", "expected", "word"),
    [
        ("learned", None, "drop the prompt"),
        ("learned", 1534, "drop the prompt"),
        ("learned", 1532, "keep the prompt"),
        ("learned in part", None, "keep the prompt"),
        ("not learned", None, "keep the prompt"),
        ("worse than before", None, "keep the prompt"),
        ("nothing to learn", None, "leave the prompt out"),
        ("too few requests", None, "not known"),
        (None, None, "not known"),
    ],
)
def test_the_word(learned: str | None, expected: float | None, word: str) -> None:
    assert verdict(learned, break_even(counted()), expected).word == word


@pytest.mark.parametrize("training", [math.nan, math.inf, -1.0])
def test_what_is_no_cost_is_not_known(training: float) -> None:
    found = break_even(counted(training), 500)
    assert (found.training, found.requests, found.days) == (None, None, None)
    assert "is not known" in found.lines[-1]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_figures_that_are_none_decide_nothing(wrong: float) -> None:
    for more, less in (
        (Spread(wrong, wrong, wrong, 3), LESS),
        (MORE, Spread(0.04, wrong, 0.05, 3)),
    ):
        decided = verdict("learned", break_even(counted(more=more, less=less), 500))
        assert decided.word == "not known"
    assert verdict(
        "not learned", break_even(counted(more=Spread(wrong, wrong, wrong, 3)))
    ).word == ("keep the prompt")


def test_prices_of_nothing_save_nothing() -> None:
    free = break_even(priced(Prices(0.0, 0.0, hour=0.0), 1000, 800, 100, 10.0), 500)
    assert (free.saved.median, free.training, free.requests) == (0.0, 0.0, None)
    assert verdict("learned", free).word == "keep the prompt"
    # All of the prompt is cached, and that is free: the request alone costs, on both sides.
    same = break_even(priced(Prices(1.0, 0.0), 1100, 1000, 100, None))
    assert verdict("learned", same).word == "keep the prompt"
    # Training that cost nothing has paid before the first request.
    given = break_even(priced(Prices(1.0, 1.0, hour=0.0), 1000, 0, 100, 10.0), 500)
    assert (given.requests, given.days) == (0, 0.0)
    tiny = break_even(priced(Prices(5e-324, 0.0, hour=1.0), 10**7, 0, 100, 1e9))
    assert tiny.saved.median > 0
    assert tiny.requests is None, "more than anybody sends"
    assert "never pays" in tiny.lines[-1]


def test_no_requests_pay_for_nothing() -> None:
    assert verdict("learned", break_even(counted()), expected_requests=0).word == "keep the prompt"


def test_without_a_cached_prompt_nothing_is_known() -> None:
    assert verdict("learned", None).word == "not known"
    assert verdict("not learned", None).word == "keep the prompt"


def test_by_what_was_measured() -> None:
    """The figures of a real vLLM, in benchmarks/results: when the prompt is to be kept."""
    for task in json.loads(MEASURED.read_text())["tasks"].values():
        more, less = (
            Spread(**task["contenders"][name]["device_s"])
            for name in ("prompted_cached", "distilled")
        )
        (said,) = task["break_even"]
        found = break_even(Counted("s", more, less, said["training"], []))
        assert (found.requests, found.most_requests) == (said["requests"], said["most_requests"])
        assert verdict("learned", found).word == task["verdict"]["word"] == "drop the prompt"
        assert verdict("learned", found, 100).word == "keep the prompt"
        assert verdict("not learned", found).word == "keep the prompt"
        # The adapter on a CPU: its products cost more than the prompt behind the cache.
        adapter = Spread(**task["contenders"]["adapter"]["device_s"])
        by_adapter = break_even(Counted("s", more, adapter, said["training"], []))
        assert verdict("learned", by_adapter).word == "keep the prompt"
