"""What a scorecard says beside its tables, a sentence each: one answer for all, harm, leaks."""

from typing import Any

from opcd.evaluation.constant import ALWAYS
from opcd.evaluation.verdict import reference_of
from opcd.runtime.files import shown


def constant_facts(card: dict[str, Any], texts: bool = True) -> list[str]:
    """What one answer for all reaches, and who gives one; nothing where answers are many.

    texts: whether the answer may be quoted.
    """
    columns, constant = card["contenders"], card.get("constant")
    facts = []
    if constant is not None and "balanced_accuracy" in columns["base"]:
        of = f" ({constant['answer']!r})" if texts else ""
        facts.append(f"one answer for all{of} reaches {constant['accuracy']:.1%}")
    reference = columns[reference_of(columns)].get("commonest_answer", {"share": 0.0})
    for name, column in columns.items():
        found = column.get("commonest_answer")
        if found is not None and found["share"] >= ALWAYS > reference["share"]:
            facts.append(
                f"{name} says {repr(found['answer']) if texts else 'the same'} to "
                f"{found['share']:.0%} of requests: its "
                f"accuracy of {column['accuracy']:.1%} is that of one answer for all, balanced "
                f"over classes {column['balanced_accuracy']:.1%}"
            )
    return facts


def harm_facts(columns: dict[str, Any]) -> list[str]:
    """What giving the prompt back does to the distilled model."""
    found = columns.get("distilled_prompted", {}).get("harm")
    if found is None:
        return []
    low, high = found["interval_95"]
    amount = f"{found['mean']:.1%} ({low:.1%} – {high:.1%})"
    if found["of"] == "all answers":
        return [f"given the prompt back, {amount} of the distilled model's answers are others"]
    return [
        f"harm: given the prompt back, {amount} of what the distilled model gets right without it "
        f"is wrong"
    ]


def lost_facts(card: dict[str, Any]) -> list[str]:
    """Tasks elsewhere, and what requests to reveal the context bring out."""
    facts = []
    for task, metrics in card.get("elsewhere_tasks", {}).items():
        for metric, found in metrics.items():
            p = f", p {found['difference']['p_value']:.2g}" if "difference" in found else ""
            facts.append(f"{task} {metric}: {found['original']:.3f} → {found['distilled']:.3f}{p}")
    if leak := card.get("leak"):
        named = {name: by for name, by in leak.items() if isinstance(by, dict)}
        shares = ", ".join(f"{name} {by['share']:.1%}" for name, by in named.items())
        facts.append(
            f"leak: {leak['requests']} requests to reveal the context bring out, of its runs of "
            f"eight words, {shares}"
        )
    return facts


def set_lines(card: dict[str, Any], texts: bool = True) -> list[str]:
    """What is said of one more set of test data; with answers quoted, or without texts."""
    said = [*constant_facts(card, texts), *harm_facts(card["contenders"])]
    lines = [f"of {shown(card['file'])}", *said]
    names = {"gain": "prompted against base", "learned": "distilled against base"}
    for name, pair in {**names, "left": "distilled against prompted"}.items():
        if found := card["differences"].get(name):
            low, high = (100 * x for x in found["interval_95"])
            lines.append(
                f"{pair}: {100 * found['mean']:+.1f} points ({low:+.1f} – {high:+.1f}, p "
                f"{found['p_value']:.2g})"
            )
    return lines
