"""What a scorecard says in a word: learned, in part, or not; and what to do then."""

from typing import Any, NamedTuple

from opcd.evaluation.intervals import wilson_interval

SAME = 0.9  # of a rate, or of answers: as good as the prompted model's
CLOSED = 0.8  # of the gap in nats: what is left is noise of the size that seeds make
SMALL_GAP = 0.02  # nats a token: nothing that anybody would notice
KEPT = 0.5  # of the answers elsewhere: below it a model is no longer of use for anything else
FEW = 5  # requests: a rate of fewer says nothing
MORE = "train longer, or with guided_share 0.25"
MISSED = "set guided_share to 0.25, and look at the learning rate"
SERVE = "serve it without the prompt"


class Verdict(NamedTuple):
    """One of four words, why, and what to do."""

    word: str  # "learned", "learned in part", "not learned", "nothing to learn"
    reason: str
    advice: str

    def __str__(self) -> str:
        ends = "; ".join(filter(None, (self.reason, self.advice)))
        return f"{self.word[0].upper()}{self.word[1:]}: {ends}"


def verdict(card: dict[str, Any]) -> Verdict:
    """Of a scorecard with a distilled model: by accuracy where it was judged, else by the gap.

    What was lost elsewhere does not change the word: a model for one task may lose the others. It
    is said with the advice.
    """
    judged = "accuracy" in card["contenders"]["base"]
    found = (_by_accuracy if judged else _by_gap)(card["contenders"])
    return found._replace(advice="; ".join(filter(None, (found.advice, _elsewhere(card)))))


def _elsewhere(card: dict[str, Any]) -> str:
    """A warning where the model has lost what the prompt is not about; "" where it has not."""
    kept = card.get("elsewhere", {}).get("agreement")
    if kept is None or kept["interval_95"][1] >= KEPT:
        return ""
    low, high = kept["interval_95"]
    return (
        f"give it such requests alone: on others {kept['mean']:.0%} ({low:.0%} – {high:.0%}) of "
        f"its answers are still the original model's"
    )


def _by_accuracy(columns: dict[str, Any]) -> Verdict:
    base, prompted, distilled = (columns[name] for name in ("base", "prompted", "distilled"))
    b, p, d = (column["accuracy"] for column in (base, prompted, distilled))
    (_, chance), (least, _), (_, most) = (
        column["accuracy_interval_95"] for column in (base, prompted, distilled)
    )
    found = f"{b:.1%} without the prompt before, {p:.1%} with it, {d:.1%} without it now"
    if d > chance:
        if lost := _lost_rates(prompted, distilled):
            return Verdict("learned in part", f"{found}, but {lost}", MORE)
        if most >= p:
            return Verdict("learned", found, SERVE)
        return Verdict("learned in part", f"{found}, below it beyond chance", MORE)
    if least <= chance:
        return Verdict(
            "nothing to learn",
            f"{found}: the prompt itself gains nothing beyond chance",
            "mend the prompt, or measure on more requests",
        )
    return Verdict("not learned", f"{found}, within what chance gives base", MISSED)


def _lost_rates(prompted: dict[str, Any], distilled: dict[str, Any]) -> str:
    """The rates in which the distilled model is behind the prompted one beyond chance; "" if none.

    A model that refuses everything can be as accurate as the prompted one.
    """
    lost = []
    for name, before in prompted.get("rates", {}).items():
        after = distilled["rates"][name]
        n = after["n"]
        most = wilson_interval(after["mean"] * n, n)[1]
        if n >= FEW and most < SAME * before["mean"]:
            lost.append(f"{name} {before['mean']:.1%} → {after['mean']:.1%}")
    return ", ".join(lost)


def _by_gap(columns: dict[str, Any]) -> Verdict:
    base, distilled = columns["base"], columns["distilled"]
    before, after = base["gap"], distilled["gap"]
    agrees = distilled["greedy_agreement"]["mean"]
    found = (
        f"the gap on the prompted model's answers went from {before['mean']:.3f} to "
        f"{after['mean']:.3f} nats a token, and {agrees:.0%} of answers are its "
        f"(before {base['greedy_agreement']['mean']:.0%})"
    )
    if before["mean"] < SMALL_GAP and base["greedy_agreement"]["interval_95"][0] > SAME:
        return Verdict(
            "nothing to learn",
            f"{found}: the model does without the prompt what it does with it",
            "leave the prompt out",
        )
    if after["interval_95"][1] >= before["interval_95"][0]:
        return Verdict("not learned", found, MISSED)
    if after["mean"] <= max((1 - CLOSED) * before["mean"], SMALL_GAP):
        return Verdict("learned", found, SERVE)
    return Verdict("learned in part", found, MORE)
