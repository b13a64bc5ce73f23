"""What a scorecard says in a word: learned, in part, or not; and what to do then."""

from typing import Any, NamedTuple

from opcd.evaluation.constant import hardly_better
from opcd.evaluation.intervals import CHANCE, wilson_interval

NEAR = 0.97  # of the prompted model's accuracy: what is lost beyond chance, and yet of no matter
SAME = 0.9  # of an accuracy, a rate, or answers: as good as the prompted model's
CLOSED = 0.8  # of the gap in nats: what is left is noise of the size that seeds make
SMALL_GAP = 0.02  # nats a token: nothing that anybody would notice
SILENT_GAP = 0.05  # nats a token: the models say the same with the same confidence
KEPT = 0.5  # of the answers elsewhere: below it a model is no longer of use for anything else
ENOUGH = 20  # requests: of fewer no word is said
FEW = 5  # requests: a rate of fewer says nothing
GUIDED = "guided_share 0.25"
SERVE = "serve it without the prompt"


class Verdict(NamedTuple):
    """One of six words, why, and what to do."""

    # "learned", "learned in part", "not learned", "worse than before", "nothing to learn", "too few
    # requests"
    word: str
    reason: str
    advice: str

    def __str__(self) -> str:
        ends = "; ".join(filter(None, (self.reason, self.advice)))
        return f"{self.word[0].upper()}{self.word[1:]}: {ends}"


def verdict(card: dict[str, Any], guided_share: float = 0.0) -> Verdict:
    """Of a scorecard with a distilled model: by accuracy where it was judged, else by the gap.

    guided_share: as the run had it, so that no run is told to set what it has set.

    What was lost elsewhere does not change the word: a model for one task may lose the others. It
    is said with the advice.
    """
    columns = card["contenders"]
    judge = _by_accuracy if "accuracy" in columns["base"] else _by_gap
    found = judge(card, guided_share)
    return found._replace(advice="; ".join(filter(None, (found.advice, _elsewhere(card)))))


def reference_of(columns: dict[str, Any]) -> str:
    """Whom the student learns from: a teacher of its own, or itself with the prompt."""
    return "teacher" if "teacher" in columns else "prompted"


def _by_accuracy(card: dict[str, Any], guided_share: float) -> Verdict:
    columns, differences = card["contenders"], card["differences"]
    base, prompted, distilled = (
        columns[name] for name in ("base", reference_of(columns), "distilled")
    )
    b, p, d = (column["accuracy"] for column in (base, prompted, distilled))
    found = f"{b:.1%} without the prompt before, {p:.1%} with it, {d:.1%} without it now"
    if base["n"] < ENOUGH:
        return _too_few(found, base["n"])
    learned, left = differences["learned"], differences["left"]
    if _beyond_chance(learned):
        if d < b:
            return Verdict("worse than before", found, _harder(guided_share))
        if of_a_constant := _of_a_constant(card, p, d, guided_share):
            return of_a_constant._replace(reason=f"{found}; {of_a_constant.reason}")
        if lost := _lost_rates(prompted, distilled):
            return Verdict("learned in part", f"{found}, but {lost}", _more(guided_share))
        if d < NEAR * p and _beyond_chance(left):
            return Verdict(
                "learned in part", f"{found}, below it beyond chance", _more(guided_share)
            )
        if d < SAME * p:
            return Verdict("learned in part", f"{found}, which may be chance", _more(guided_share))
        return Verdict("learned", found, SERVE)
    if p <= b or not _beyond_chance(differences["gain"]):
        return Verdict(
            "nothing to learn",
            f"{found}: the prompt itself gains nothing beyond chance",
            "mend the prompt, or measure on more requests",
        )
    return Verdict("not learned", f"{found}, within what chance gives base", _harder(guided_share))


def _of_a_constant(
    card: dict[str, Any], prompted: float, distilled: float, guided_share: float
) -> Verdict | None:
    """Of a model that has learned to say the same to everything, or little more."""
    if "constant" not in card:
        return None
    constant = card["constant"]["accuracy"]
    if hardly_better(prompted, constant):
        return Verdict(
            "nothing to learn",
            f"one answer for everything has {constant:.1%}, and the prompt itself is hardly better",
            "mend the prompt: demonstrations carry more than instructions",
        )
    if hardly_better(distilled, constant):
        return Verdict(
            "not learned",
            f"one answer for everything has {constant:.1%}, and the model is hardly better",
            _harder(guided_share),
        )
    return None


def _by_gap(card: dict[str, Any], guided_share: float) -> Verdict:
    columns, differences = card["contenders"], card["differences"]
    base, distilled = columns["base"], columns["distilled"]
    before, after, closed = base["gap"], distilled["gap"], differences["gap_closed"]
    agreed, agrees = (column["greedy_agreement"]["mean"] for column in (base, distilled))
    found = (
        f"the gap on the prompted model's answers went from {before['mean']:.3f} to "
        f"{after['mean']:.3f} nats a token, and {agrees:.0%} of answers are its (before "
        f"{agreed:.0%})"
    )
    if before["requests"] < ENOUGH:
        return _too_few(found, before["requests"])
    if before["interval_95"][1] < SILENT_GAP and agreed > SAME:
        return Verdict(
            "nothing to learn",
            f"{found}: the model does without the prompt what it does with it",
            "leave the prompt out",
        )
    if not _beyond_chance(closed):
        return Verdict("not learned", found, _harder(guided_share))
    if closed["mean"] < 0:
        return Verdict("worse than before", found, _harder(guided_share))
    bound = max((1 - CLOSED) * before["mean"], SMALL_GAP)
    if after["mean"] < -bound:
        found = f"{found}, of which it is more certain than the prompted model is"
        return Verdict("learned in part", found, "train for fewer steps, or at a lower rate")
    if after["mean"] <= bound:
        return Verdict("learned", found, SERVE)
    return Verdict("learned in part", found, _more(guided_share))


def _beyond_chance(difference: dict[str, Any]) -> bool:
    below: bool = difference["p_value"] < CHANCE
    return below


def _too_few(found: str, n: int) -> Verdict:
    return Verdict(
        "too few requests",
        f"{found}, of {n} requests",
        f"score it on {ENOUGH} or more, better 200",
    )


def _more(guided_share: float) -> str:
    """What to do where something was learned."""
    return "train longer" if guided_share else f"train longer, or with {GUIDED}"


def _harder(guided_share: float) -> str:
    """What to do where nothing was."""
    if guided_share:
        return "look at the learning rate, and at the training prompts"
    return f"set {GUIDED.replace(' ', ' to ')}, and look at the learning rate"


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


def _elsewhere(card: dict[str, Any]) -> str:
    """A warning where the model has lost what the prompt is not about; "" where it has not."""
    kept = card.get("elsewhere", {}).get("agreement")
    if kept is None or kept["interval_95"][1] >= KEPT:
        return ""
    low, high = kept["interval_95"]
    return (
        f"use it for requests like these only: of its answers to others {kept['mean']:.0%} "
        f"({low:.0%} – {high:.0%}) are still the original model's"
    )
