"""The scorecard as people read it: in the terminal, and as report.md with its training curve."""

import math
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from opcd import __version__
from opcd.config import TrainConfig
from opcd.evaluation.facts import constant_facts, harm_facts, lost_facts, set_lines
from opcd.evaluation.figure import blank_figure
from opcd.evaluation.intervals import CHANCE
from opcd.evaluation.savings import savings_section
from opcd.evaluation.spikes import spikes
from opcd.evaluation.verdict import Verdict, reference_of
from opcd.runtime.files import shown, write_text
from opcd.runtime.strict_json import parse_json
from opcd.tasks.messages import asked

SPIKES_SHOWN = 5
MINIMISED = {0.0: "reverse KL", 1.0: "forward KL"}  # by the share of the latter


def scorecard_table(card: dict[str, Any]) -> str:
    """The contenders as text, one a line; below it their rates, where the scorer gives some."""
    judged = "accuracy" in next(iter(card["contenders"].values()))
    measured = ("accuracy", "95 % interval", "agrees") if judged else ("agrees", "95 % interval")
    rows: list[tuple[str, ...]] = [("", "", *measured, "n", "tokens", "cut")]
    for name, column in card["contenders"].items():
        agrees = column["greedy_agreement"]
        cells = [f"{agrees['mean']:.1%}"]
        low, high = column["accuracy_interval_95"] if judged else agrees["interval_95"]
        cells.insert(0 if judged else 1, f"{low:.1%} – {high:.1%}")
        if judged:
            cells.insert(0, f"{column['accuracy']:.1%}")
        rows.append(
            (
                name,
                column["meaning"],
                *cells,
                str(column["n"]),
                f"{column['mean_completion_tokens']:.1f}",
                f"{column['truncated_share']:.0%}",
            )
        )
    tables = [aligned(rows, texts=2)]
    if rates := _rate_rows(card["contenders"]):
        tables.append(aligned(rates, texts=1))
    return "\n\n".join(tables)


def _rate_rows(columns: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each rate, which all contenders have, and one for their mean; none without."""
    first = next(iter(columns.values()))
    rows: list[tuple[str, ...]] = [("", *columns)]
    for name, rate in first.get("rates", {}).items():
        means = [f"{column['rates'][name]['mean']:.1%}" for column in columns.values()]
        rows.append((f"{excerpt(name, 40)} ({rate['n']})", *means))
    if "balanced_accuracy" in first:
        means = [f"{column['balanced_accuracy']:.1%}" for column in columns.values()]
        rows.append(("balanced", *means))
    return rows if len(rows) > 1 else []


def aligned(rows: Sequence[tuple[str, ...]], texts: int) -> str:
    """Columns of equal width, the first `texts` of them set left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left = [cell.ljust(w) for cell, w in zip(row[:texts], widths[:texts], strict=True)]
        right = [cell.rjust(w) for cell, w in zip(row[texts:], widths[texts:], strict=True)]
        lines.append("  ".join((*left, *right)).rstrip())
    return "\n".join(lines)


def _internalised(card: Mapping[str, Any]) -> str:
    share = card["internalised"]
    if share is None:
        return "internalised: the prompt gained nothing here, so there is nothing to take over"
    around = ""
    if "internalised_interval_95" in card:  # not of versions before
        if (interval := card["internalised_interval_95"]) is None:
            return (
                "internalised: what the prompt gained may be chance, so a share of it says nothing"
            )
        around = f" ({interval[0]:.0%} to {interval[1]:.0%})"
    return f"internalised: {share:.1%}{around} of what the prompt gained is now in the weights"


def scorecard_facts(card: dict[str, Any], texts: bool = True) -> list[str]:
    """What the table does not say, a sentence each; with answers quoted, or without texts."""
    columns = card["contenders"]
    judged = "accuracy" in columns["base"]
    facts = [_gain(card)] if judged else []
    if judged and "distilled" in columns:
        facts.append(_internalised(card))
    if cut := _shares(columns, "truncated_share", above=0.5):
        alone = [name for name, c in columns.items() if c["truncated_share"] > 0.5] == ["base"]
        facts.append(
            f"most answers of base alone were cut ({cut}): without the prompt it does not know how "
            f"short they are to be"
            if alone
            else f"most answers were cut ({cut}): raise max_completion_tokens, or look at what "
            f"ends an answer there"
        )
    if several := _shares(columns, "several_labels_share"):
        facts.append(
            f"answers that hold the right label and others of the data, which contains finds "
            f"right ({several}): the scorers exact, choice and regex do not"
        )
    facts += [*constant_facts(card, texts), *harm_facts(columns)]
    facts.append(_gap(columns))
    before, after = card["divergence"]["before"], card["divergence"]["after"]
    facts.append(
        f"divergence to the teacher on {card['divergence']['prompts']} held-out prompts: "
        f"{before:.3f}"
        + (f" → {after:.3f}" if after is not None else "")
        + f" nats a token, of answers of at most {card['decoding']['max_completion_tokens']}"
    )
    if "elsewhere" in card:
        facts.append(_elsewhere(card["elsewhere"]))
    facts += lost_facts(card)
    facts.append(f"prompt tokens saved a request: {card['prompt_tokens_saved']:.0f}")
    where = "test data:" if card["data"]["part"] == "test" else "requests kept out of"
    facts.append(f"scored on {where} {shown(card['data']['file'])}")
    facts.append(
        f"agrees: answers that are the prompted model's word for word; tokens: mean length of an "
        f"answer; cut: share that reached max_completion_tokens "
        f"({card['decoding']['max_completion_tokens']})"
    )
    if card["decoding"].get("temperature"):
        drawn = card["decoding"]
        facts.append(
            f"answers are drawn at temperature {drawn['temperature']:g}, top_k "
            f"{drawn['top_k']} (0: all), top_p {drawn['top_p']:g}, by the same random numbers for "
            f"every contender; so are those that agree, and those that the gap is measured on"
        )
    if thought := _shares(columns, "reasoning_share"):
        facts.append(f"answers with reasoning, which is not judged: {thought}")
    if "selection" in card:
        facts.append(f"checkpoint: {card['selection']['how']}")
    return facts


def _gap(columns: dict[str, Any]) -> str:
    """What a model without the context misses of the prompted one's answers, before and after."""
    found = [columns[name] for name in ("base", "distilled") if name in columns]
    nats = " → ".join(f"{column['gap']['mean']:.3f}" for column in found)
    low, high = found[-1]["gap"]["interval_95"]
    top = " → ".join(f"{column['top1_agreement']['mean']:.0%}" for column in found)
    return (
        f"gap on the prompted model's answers: {nats} nats a token ({low:.3f} – {high:.3f}); its "
        f"next token is the likeliest at {top} of places"
    )


def _gain(card: dict[str, Any]) -> str:
    """Whether the prompt is worth anything, as far as the requests can tell."""
    columns = card["contenders"]
    base, reference = columns["base"], columns[reference_of(columns)]
    gain = card["differences"]["gain"]
    low, high = gain["interval_95"]
    if gain["p_value"] >= CHANCE:
        verdict = f"which may be chance (requests: {base['n']}): mend the prompt or measure on more"
    elif gain["mean"] > 0:
        verdict = f"a gain of {_points(low, high)}: there is something to distil"
    else:
        verdict = f"a loss of {_points(-high, -low)}: mend the prompt before it is distilled"
    return f"the prompt: {base['accuracy']:.1%} → {reference['accuracy']:.1%}, {verdict}"


def _points(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} points"


def _elsewhere(found: dict[str, Any]) -> str:
    """How much of the original model is left where the context has no say."""
    low, high = found["agreement"]["interval_95"]
    kind = f"requests of {shown(found['file'])}" if found["file"] else "unrelated requests"
    return (
        f"elsewhere: on {found['prompts']} {kind} {found['agreement']['mean']:.0%} of greedy "
        f"answers are the original model's ({low:.0%} – {high:.0%}), divergence "
        f"{found['reverse_kl']['mean']:.3f} nats a token"
    )


def elsewhere_table(found: dict[str, Any]) -> str:
    """The figures elsewhere as text: all requests, then a kind a line, the least alike first."""
    whole = {name: x["mean"] for name, x in found.items() if isinstance(x, dict) and "mean" in x}
    kinds = sorted(found["by_kind"].items(), key=lambda item: -item[1]["reverse_kl"])
    rows: list[tuple[str, ...]] = [("", "same", "same up to", "reverse KL", "forward KL")]
    for kind, means in [("all", {"prompts": found["prompts"], **whole}), *kinds]:
        rows.append(
            (
                f"{excerpt(kind, 40)} ({means['prompts']})",
                f"{means['agreement']:.0%}",
                f"{means['common_prefix']:.0%}",
                f"{means['reverse_kl']:.3f}",
                f"{means['forward_kl']:.3f}",
            )
        )
    return aligned(rows, texts=1)


def _elsewhere_section(found: dict[str, Any]) -> list[str]:
    return [
        "\n## Elsewhere\n",
        "```",
        elsewhere_table(found),
        "```\n",
        f"Original and distilled model, both without the context, on requests that the context has "
        f"nothing to do with. Same: greedy answers of at most "
        f"{found['decoding']['max_completion_tokens']} tokens that are equal; same up to: the "
        f"share of the original's tokens before the first that differs. Divergences in nats a "
        f"token of the original's answers.",
    ]


def _shares(columns: dict[str, Any], share: str, above: float = 0.0) -> str:
    found = {name: column.get(share, 0.0) for name, column in columns.items()}
    return ", ".join(f"{name} {x:.0%}" for name, x in found.items() if x > above)


def before_after(answers: Sequence[dict[str, Any]], count: int = 5) -> str:
    """`count` test prompts, spread over the file, with the answers before and after."""
    lines = []
    for i in range(min(count, len(answers))):
        row = answers[i * len(answers) // count if len(answers) > count else i]
        lines.append(f"  {excerpt(asked(row['prompt']), 88)}")
        for name in ("base", "prompted", "teacher", "distilled"):
            if name in row:
                value = row.get(f"{name}_right")
                mark = " " if value is None else {1: "✓", 0: "✗"}.get(value, f"{value:.0%}")
                lines.append(f"    {mark} {name:<10} {excerpt(row[name], 74)}")
    return "\n".join(lines)


def write_report(
    folder: Path,
    card: dict[str, Any],
    answers: Sequence[dict[str, Any]],
    config: TrainConfig,
    metrics: Sequence[dict[str, Any]],
) -> None:
    """Write report.md, and curve.png where there are metrics."""
    text = [f"# {shown(config.context)} → {config.model}\n"]
    if "verdict" in card:
        text.append(f"**{Verdict(**card['verdict'])}.**\n")
    if found := [*raised_alarms(metrics), *spike_lines(metrics)]:
        text += ["## Alarms\n", *(f"- {line}" for line in found), ""]
    text += ["## Scorecard\n", "```", scorecard_table(card), "```\n"]
    text += [f"- {fact}" for fact in scorecard_facts(card)]
    for name, found in card.get("test_sets", {}).items():
        text += [f"\n### {name}\n", "```", scorecard_table(found), "```\n"]
        text += [f"- {line}" for line in set_lines(found)]
    if checked := check_lines(folder, card):
        text += ["\n## Before training\n", "```", *checked, "```"]
    steps = [m for m in metrics if "loss" in m]
    if steps:
        minimised = MINIMISED.get(config.forward_share, "mixture")
        draw_curve(metrics, folder / "curve.png", minimised)
        seconds = sum(m["step_time_s"] for m in steps)
        text += [
            "\n## Training\n",
            "![divergence, validation accuracy and completion length](curve.png)\n",
            f"{len(steps)} steps in {seconds:.0f} s: rollout "
            f"{sum(m['rollout_time_s'] for m in steps):.0f} s, teacher "
            f"{sum(m['teacher_time_s'] for m in steps):.0f} s, update "
            f"{sum(m['update_time_s'] for m in steps):.0f} s (without validation and saving).",
        ]
    text += savings_section(folder)
    text += _elsewhere_section(card["elsewhere"]) if "elsewhere" in card else []
    text += ["\n## Before and after\n", "```", before_after(answers), "```\n"]
    files = {
        "All answers": "answers.jsonl",
        "Answers elsewhere": "elsewhere.jsonl",
        "Answers to requests to reveal the context": "leak.jsonl",
        "All of them as a table": "answers.csv",
        "All settings": "config.yaml",
        "Every step": "metrics.jsonl",
        "The check before training": "check.json",
        "What it saves": "serving.json",
    }
    there = [f"{what}: `{name}`." for what, name in files.items() if (folder / name).is_file()]
    text.append(" ".join(there))
    text.append(f"\nopcd {__version__}, {date.today().isoformat()}.\n")
    write_text(folder / "report.md", "\n".join(text))


def check_lines(folder: Path, card: Mapping[str, Any]) -> list[str]:
    """What `opcd check` found before training, where it is in the folder and of the same prompt."""
    file = folder / "check.json"
    if not file.is_file():
        return []
    try:
        found = parse_json(file.read_text("utf-8"))
    except ValueError:
        return []
    before, now = found.get("measured_by", {}), card["measured_by"]
    if any(before.get(what) != now[what] for what in ("form", "model", "teacher")):
        return ["other     check.json is of another prompt, or of other models"]
    return [str(line) for line in found["summary"]]


def raised_alarms(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The alarms of a run, each with the step that it was raised after."""
    return [
        f"step {row['step']}, {alarm}"
        for row in metrics
        for alarm in row.get("alarms", {}).values()
    ]


def spike_lines(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The steps whose divergence stood out, the highest ones, if there are any."""
    found = spikes(metrics)
    highest = sorted(found, key=lambda spike: -spike.divergence)[:SPIKES_SHOWN]
    more = f" (and {len(found) - SPIKES_SHOWN} more)" if len(found) > SPIKES_SHOWN else ""
    listed = "; ".join(map(str, sorted(highest)))
    return [f"divergence that stood out, nats a token: {listed}{more}"] if found else []


def draw_curve(
    metrics: Sequence[dict[str, Any]], path: Path, divergence: str = "reverse KL"
) -> None:
    """Divergence, completion length, and what validations found over the steps, as a PNG."""
    from matplotlib.ticker import MaxNLocator

    validated = [m for m in metrics if "validation" in m]
    metrics = [m for m in metrics if "loss" in m]
    steps = [m["step"] for m in metrics]
    figure = blank_figure((11, 3.2))
    axes = figure.subplots(1, 3 if validated else 2)
    axes[0].plot(
        steps,
        [math.nan if m["divergence"] is None else m["divergence"] for m in metrics],
        color="C0",
        label=f"training, {divergence}",
    )
    if any("guided_loss" in m for m in metrics):
        guided = [m.get("guided_loss", math.nan) for m in metrics]
        axes[0].plot(
            steps, guided, color="C4", alpha=0.6, label="guided or recorded, what is minimised"
        )
        axes[0].legend(frameon=False)
    if validated:
        where = [m["step"] for m in validated]
        held_out = [m["validation"]["divergence"] for m in validated]
        axes[0].plot(where, held_out, "o-", color="C3", label="held out, reverse KL")
        axes[0].legend(frameon=False)
        # Versions before measured none.
        gaps = [m["validation"].get("gap", math.nan) for m in validated]
        axes[0].plot(where, gaps, "s--", color="C5", label="gap on the teacher's answers")
        axes[0].legend(frameon=False)
        name = "accuracy" if "accuracy" in validated[0]["validation"] else "greedy_agreement"
        axes[2].plot(where, [100 * m["validation"][name] for m in validated], "o-", color="C2")
        axes[2].set(title=f"validation {name.replace('_', ' ')}, %", ylim=(-3, 103))
    axes[0].set(title="divergence to the teacher, nats a token", ylim=(0, None))
    axes[1].plot(steps, [m["mean_completion_tokens"] for m in metrics], color="C1")
    axes[1].set(title="completion length, tokens", ylim=(0, None))
    for axis in axes:
        axis.set(xlabel="step", xlim=(0, steps[-1] + 1))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def excerpt(text: str, width: int) -> str:
    """A text in a line of at most `width` characters, without control characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= width else text[: width - 1] + "…"
