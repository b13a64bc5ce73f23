"""The scorecard as people read it: in the terminal, and as report.md with its training curve."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd.config import TrainConfig


def scorecard_table(card: dict[str, Any]) -> str:
    """The contenders as text, one a line; below it their rates, where the scorer gives some."""
    rows: list[tuple[str, ...]] = [("", "", "accuracy", "95 % interval", "n", "tokens", "cut")]
    for name, column in card["contenders"].items():
        low, high = column["accuracy_interval_95"]
        rows.append(
            (
                name,
                column["meaning"],
                f"{column['accuracy']:.1%}",
                f"{low:.1%} – {high:.1%}",
                str(column["n"]),
                f"{column['mean_completion_tokens']:.1f}",
                f"{column['truncated_share']:.0%}",
            )
        )
    tables = [_aligned(rows, texts=2)]
    if rates := _rate_rows(card["contenders"]):
        tables.append(_aligned(rates, texts=1))
    return "\n\n".join(tables)


def _rate_rows(columns: dict[str, Any]) -> list[tuple[str, ...]]:
    """A heading and a row for each contender; none without rates."""
    counts = {name: r["n"] for c in columns.values() for name, r in c.get("rates", {}).items()}
    if not counts:
        return []
    balanced = any("balanced_accuracy" in column for column in columns.values())
    heading = [f"{name} ({n})" for name, n in counts.items()]
    rows: list[tuple[str, ...]] = [("", *heading, *["balanced"] * balanced)]
    for name, column in columns.items():
        means = [column.get("rates", {}).get(rate, {}).get("mean") for rate in counts]
        means += [column.get("balanced_accuracy")] * balanced
        rows.append((name, *("" if x is None else f"{x:.1%}" for x in means)))
    return rows


def _aligned(rows: Sequence[tuple[str, ...]], texts: int) -> str:
    """Columns of equal width, the first `texts` of them set left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(w) for cell, w in zip(row[:texts], widths[:texts], strict=True)]
        right = [cell.rjust(w) for cell, w in zip(row[texts:], widths[texts:], strict=True)]
        lines.append("  ".join((*left, *right)).rstrip())
    return "\n".join(lines)


def scorecard_facts(card: dict[str, Any]) -> list[str]:
    """What the table does not say, a sentence each."""
    facts = []
    if "distilled" in card["contenders"]:
        share = card["internalised"]
        facts.append(
            "internalised: the prompt gained nothing here, so there is nothing to take over"
            if share is None
            else f"internalised: {share:.1%} of what the prompt gained is now in the weights"
        )
    cut = card["contenders"]["prompted"]["truncated_share"]
    if cut > 0.5:
        facts.append(
            f"{cut:.0%} of the prompted answers were cut: raise max_completion_tokens, or look at "
            f"what ends an answer there"
        )
    before, after = card["divergence"]["before"], card["divergence"]["after"]
    facts.append(
        f"divergence to the teacher on {card['divergence']['prompts']} held-out prompts: "
        f"{before:.3f}" + (f" → {after:.3f}" if after is not None else "") + " nats a token"
    )
    facts.append(f"prompt tokens saved a request: {card['prompt_tokens_saved']:.0f}")
    facts.append(f"scored on test data: {card['data']['file']}")
    facts.append(
        f"tokens: mean length of an answer; cut: share that reached max_completion_tokens "
        f"({card['decoding']['max_completion_tokens']})"
    )
    shares = {name: c.get("reasoning_share", 0) for name, c in card["contenders"].items()}
    if any(shares.values()):
        thought = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share)
        facts.append(f"answers with reasoning, which is not judged: {thought}")
    if "selection" in card:
        facts.append(f"checkpoint: {card['selection']['how']}")
    return facts


def before_after(answers: Sequence[dict[str, Any]], count: int = 5) -> str:
    """`count` test prompts, spread over the file, with the answers before and after."""
    lines = []
    for i in range(min(count, len(answers))):
        row = answers[i * len(answers) // count if len(answers) > count else i]
        lines.append(f"  {_short(row['prompt'][-1]['content'], 88)}")
        for name in ("base", "prompted", "distilled"):
            if name in row:
                value = row[f"{name}_right"]
                mark = {1: "✓", 0: "✗"}.get(value, f"{value:.0%}")
                lines.append(f"    {mark} {name:<10} {_short(row[name], 74)}")
    return "\n".join(lines)


def write_report(
    folder: Path,
    card: dict[str, Any],
    answers: Sequence[dict[str, Any]],
    config: TrainConfig,
    metrics: Sequence[dict[str, Any]],
) -> None:
    """Write report.md, and curve.png where there are metrics."""
    text = [f"# {config.context} → {config.model}\n", "## Scorecard\n"]
    text += ["```", scorecard_table(card), "```\n"]
    text += [f"- {fact}" for fact in scorecard_facts(card)]
    if metrics:
        minimised = {0.0: "reverse KL", 1.0: "forward KL"}.get(config.forward_share, "mixture")
        draw_curve(metrics, folder / "curve.png", minimised)
        seconds = sum(m["step_time_s"] for m in metrics)
        text += [
            "\n## Training\n",
            "![divergence, validation accuracy and completion length](curve.png)\n",
            f"{len(metrics)} steps in {seconds:.0f} s: rollout "
            f"{sum(m['rollout_time_s'] for m in metrics):.0f} s, teacher "
            f"{sum(m['teacher_time_s'] for m in metrics):.0f} s, update "
            f"{sum(m['update_time_s'] for m in metrics):.0f} s (without validation and saving).",
        ]
    text += ["\n## Before and after\n", "```", before_after(answers), "```\n"]
    text += [
        "All answers: `answers.jsonl`. All settings: `config.yaml`. Every step: `metrics.jsonl`.\n"
    ]
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")


def draw_curve(
    metrics: Sequence[dict[str, Any]], path: Path, divergence: str = "reverse KL"
) -> None:
    """Divergence, validation accuracy and completion length over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    steps = [m["step"] for m in metrics]
    validated = [m for m in metrics if "validation" in m]
    figure, axes = pyplot.subplots(1, 3 if validated else 2, figsize=(11, 3.2), dpi=110)
    axes[0].plot(
        steps,
        [math.nan if m["divergence"] is None else m["divergence"] for m in metrics],
        color="C0",
        label=f"training, {divergence}",
    )
    if any("guided_loss" in m for m in metrics):
        guided = [m.get("guided_loss", math.nan) for m in metrics]
        axes[0].plot(steps, guided, color="C4", alpha=0.6, label="guided, what is minimised")
        axes[0].legend(frameon=False)
    if validated:
        where = [m["step"] for m in validated]
        held_out = [m["validation"]["divergence"] for m in validated]
        axes[0].plot(where, held_out, "o-", color="C3", label="held out, reverse KL")
        axes[0].legend(frameon=False)
        accuracy = [100 * m["validation"]["accuracy"] for m in validated]
        axes[2].plot(where, accuracy, "o-", color="C2")
        axes[2].set(title="validation accuracy, %", ylim=(-3, 103))
    axes[0].set(title="divergence to the teacher, nats a token", ylim=(0, None))
    axes[1].plot(steps, [m["completion_tokens_mean"] for m in metrics], color="C1")
    axes[1].set(title="completion length, tokens", ylim=(0, None))
    for axis in axes:
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to `last_step`; a line cut off by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if last_step is None or row["step"] <= last_step:
                rows.append(row)
    return rows


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
