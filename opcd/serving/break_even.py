"""Whether a trained prompt pays for itself: pure functions of figures, printed with their formula.

A request behind the prompt is counted with the server's prefix cache on: without one every prompt
looks dear.
"""

import math
from typing import NamedTuple

from opcd.serving.spread import Spread

MOST_REQUESTS = 1e15
NOT_LEARNED = ("not learned", "worse than before", "learned in part")


class Prices(NamedTuple):
    """What somebody else asks for; in one currency, whichever."""

    fresh: float  # a million tokens of prompts
    cached: float  # a million of those that were read before
    hour: float | None = None  # of the machine that the run was trained on


class Counted(NamedTuple):
    """What a request costs behind the cached prompt, and without it, in one unit."""

    unit: str  # "s" of the device, or "price"
    prompted: Spread
    distilled: Spread
    training: float | None  # in the unit; None where that is not known
    words: list[str]  # where the numbers come from, for people


class BreakEven(NamedTuple):
    """After how many requests a run has paid for itself."""

    unit: str
    saved: Spread  # a request; low and high: both sides at the ends that speak against, and for it
    training: float | None
    requests: int | None  # None where nothing is saved, or training has no figure in this unit
    most_requests: int | None  # by the least that is saved; None where that may be nothing
    days: float | None  # at so many requests a day
    lines: list[str]  # formula and inputs

    @property
    def saves(self) -> bool:
        """Whether a request costs less without the prompt by more than rounds differ, and by so
        much that training pays at all."""
        return self.saved.low > 0 and (self.training is None or self.most_requests is not None)


class Verdict(NamedTuple):
    """One of four words, why, and what to do."""

    word: str  # "drop the prompt", "keep the prompt", "leave the prompt out" or "not known"
    reason: str
    advice: str

    def __str__(self) -> str:
        ends = "; ".join(filter(None, (self.reason, self.advice)))
        return f"{self.word[0].upper()}{self.word[1:]}: {ends}"


def priced(
    prices: Prices,
    prompt_tokens: float,
    cached_tokens: float,
    without_tokens: float,
    trained_s: float | None,
) -> Counted:
    """Of an API's prices. Answers are left out: they are as long, and as dear, on both sides."""
    fresh = prompt_tokens - cached_tokens
    prompted = (fresh * prices.fresh + cached_tokens * prices.cached) / 1e6
    without = without_tokens * prices.fresh / 1e6
    cost = None if prices.hour is None or trained_s is None else prices.hour * trained_s / 3600
    words = [
        f"with the prompt ({fresh:,.0f} tokens x {prices.fresh:g} + {cached_tokens:,.0f} cached x "
        f"{prices.cached:g}) / 1,000,000 = {prompted:.3g} a request; without {without_tokens:,.0f} "
        f"x {prices.fresh:g} / 1,000,000 = {without:.3g}",
    ]
    if cost is not None and trained_s is not None:
        words.append(f"training {trained_s / 3600:.3g} h x {prices.hour:g} = {cost:.3g}")
    one = Spread(prompted, prompted, prompted, 1)
    return Counted("price", one, Spread(without, without, without, 1), cost, words)


def break_even(counted: Counted, requests_a_day: float | None = None) -> BreakEven:
    """Requests until ``training <= requests · (prompted - distilled)``.

    What training cost counts as not known where it is no number from 0 on.
    """
    unit, more, less, training, words = counted
    if training is not None and not 0 <= training < math.inf:
        training = None
    saved = Spread(
        more.median - less.median, more.low - less.high, more.high - less.low, min(more.n, less.n)
    )
    name = "s of the device" if unit == "s" else "in the currency of the prices"
    lines = [
        *words,
        f"saved a request {saved.median:.3g} ({saved.low:.3g} to {saved.high:.3g}) {name}",
    ]
    requests = most = days = None
    if training is None:
        lines.append("after how many requests training has paid is not known: see above")
    elif (requests := _after(training, saved.median)) is None:
        lines.append("nothing is saved a request, so that training never pays")
    else:
        most = _after(training, saved.low)
        upper = f"at most {most:,}" if most is not None else "or never, as rounds differ by as much"
        lines.append(
            f"pays after training / saved = {training:.3g} / {saved.median:.3g} = {requests:,} "
            f"requests ({upper})"
        )
        if requests_a_day:
            days = requests / requests_a_day
            lines.append(f"that is {days:.3g} days at {requests_a_day:,.0f} requests a day")
    return BreakEven(unit, saved, training, requests, most, days, lines)


def _after(training: float, saved: float) -> int | None:
    """Requests; None where it is never, or after more than anybody sends."""
    if not saved > 0 or not training / saved <= MOST_REQUESTS:
        return None
    return math.ceil(training / saved)


def verdict(
    learned: str | None,  # the scorecard's word; None where nothing was scored
    found: BreakEven | None,  # None where the cached prompt was not measured
    expected_requests: float | None = None,  # that come between two changes of the prompt
) -> Verdict:
    """The first of the reasons for the prompt that holds; "drop the prompt" where none does."""
    if learned in NOT_LEARNED:
        return Verdict(
            "keep the prompt",
            f"what it gains is not all in the weights (the scorecard: {learned})",
            "train on, and measure again",
        )
    if learned == "nothing to learn":
        return Verdict(
            "leave the prompt out",
            "by the scorecard it gains nothing",
            "serve the original model without it",
        )
    if found is None:
        return Verdict(
            "not known",
            "the prompt was not measured behind a server's prefix cache",
            "serve it with one that counts cached tokens, and measure again",
        )
    saved = found.saved
    if not all(map(math.isfinite, saved)):
        return Verdict(
            "not known",
            "what a request costs is no number with the prompt, or without it",
            "measure again, and look at the prices",
        )
    amount = f"{saved.median:.3g} ({saved.low:.3g} to {saved.high:.3g})"
    unit = "s of the device a request" if found.unit == "s" else "a request, at these prices"
    if not found.saves:
        return Verdict(
            "keep the prompt",
            f"behind the server's cache it costs no more than rounds differ by: {amount} {unit}",
            "keep it in the request, with the prefix cache on",
        )
    if found.unit == "s" and saved.n < 2:
        return Verdict(
            "not known",
            f"{amount} {unit} were saved in one round alone, and by how much rounds differ is not "
            f"known",
            "measure again with a larger --max-minutes",
        )
    if learned != "learned":
        return Verdict(
            "not known",
            f"{amount} {unit} are saved, but whether the model has learned the prompt is not known",
            "score it on test data of 20 requests or more",
        )
    pays = found.most_requests
    if expected_requests is not None and pays is None:
        return Verdict(
            "not known",
            f"{amount} {unit} are saved, but whether {expected_requests:,.0f} requests pay for "
            f"training is not known: what it cost has no figure in the same unit",
            "pass --price-fresh, --price-cached and --price-hour",
        )
    if expected_requests is not None and pays is not None and expected_requests < pays:
        return Verdict(
            "keep the prompt",
            f"{expected_requests:,.0f} requests are expected before it changes, and a run has paid "
            f"for itself after {found.requests:,} to {pays:,}",
            "keep it in the request, with the prefix cache on",
        )
    after = "what training cost is not known in the same unit"
    if pays is not None:
        after = f"the run has paid for itself after {found.requests:,} to {pays:,} requests"
    return Verdict(
        "drop the prompt",
        f"{amount} {unit} are saved; {after}",
        "serve the distilled model without it",
    )
