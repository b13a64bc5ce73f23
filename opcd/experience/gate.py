"""Whether a round is kept: better on validation beyond chance, and not worse elsewhere."""

from typing import Any, NamedTuple

from opcd.evaluation.intervals import Difference, PerRequest, paired_difference
from opcd.experience.measuring import Measured, more_right

CHANCE = 0.10  # one-sided: 90 % sure that it is better


class Decision(NamedTuple):
    """Whether a round's weights are taken, and why."""

    accepted: bool
    reason: str
    figures: dict[str, Any] = {}  # noqa: RUF012  # of a tuple: never changed


def decide(
    before: Measured,
    after: Measured,
    agreed_before: PerRequest,
    agreed_after: PerRequest,
    most_loss: float,
) -> Decision:
    """Hold a round's weights against those that it began with, request by request.

    before, after: the answers to the validation problems. Better is a one-sided paired test
        (`intervals.paired_difference`, whose p value is two-sided): at 300 problems of which 60
        change, 36 must become right where 24 become wrong, +4 points (p 0.078; of 35 and 25, +3.3,
        it is 0.12).
    agreed_before, agreed_after: which answers elsewhere are still the original model's; empty where
        that is not measured. The fall must not exceed `most_loss` beyond its 95 % interval.
    """
    better = more_right(after, before)
    if better is None:
        return Decision(False, "no validation answer could be judged before and after")
    p = one_sided(better)
    figures: dict[str, Any] = {"better": better.summary() | {"p_one_sided": p}}
    gained = f"{100 * better.mean:+.1f} points on {better.requests} validation problems"
    if p > CHANCE:
        return Decision(False, f"not better beyond chance: {gained}, p {p:.2g}", figures)
    if agreed_after.totals:
        fall = paired_difference(agreed_before, agreed_after)
        figures["elsewhere_fall"] = fall.summary()
        if fall.interval[0] > most_loss:
            return Decision(
                False,
                f"worse elsewhere: {fall.mean:.1%} of {fall.requests} more unrelated answers are "
                f"no longer the original model's (at least {fall.interval[0]:.1%}, allowed "
                f"{most_loss:.1%})",
                figures,
            )
    return Decision(True, f"better: {gained}, p {p:.2g}", figures)


def one_sided(apart: Difference) -> float:
    """How often chance alone gives as much more; signs drawn anew fall alike on both sides."""
    return apart.p_value / 2 if apart.mean > 0 else 1 - apart.p_value / 2
