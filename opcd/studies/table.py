"""Rivals as people read them."""

from collections.abc import Sequence
from typing import Any

from opcd.evaluation.report import aligned

NOTHING = "–"


def rivals_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a rival."""
    judged = "accuracy" in rows[0]
    what = "accuracy" if judged else "agrees"
    lines: list[tuple[str, ...]] = [
        ("", what, "95 % interval", "tokens left", "elsewhere", "harm", "train s", "trained on", "")
    ]
    for row in rows:
        reached = row.get("accuracy") if judged else row["greedy_agreement"]
        low, high = row["interval_95"]
        lines.append(
            (
                row["rival"],
                f"{reached:.1%}",
                f"{low:.1%} – {high:.1%}",
                f"{row['prompt_tokens']:.0f}",
                _percent(row["elsewhere"]),
                _percent(row["harm"]),
                f"{row['train_s']:.0f}" if row["train_s"] else NOTHING,
                f"{row['tokens']:.0f}" if row["tokens"] else NOTHING,
                row["extra_work"],
            )
        )
    legend = (
        "tokens left: what a request still carries in front; elsewhere: answers on other requests "
        "that are the original model's; harm: right without the prompt, wrong with it; trained on: "
        "tokens"
    )
    return f"{aligned(lines, texts=1)}\n\n{legend}"


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.1%}"
