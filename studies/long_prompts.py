"""One task behind prompts of about 0.1k, 1k and 4k tokens: what they reach, and what they cost.

    python -m studies.long_prompts --hours 2

The prompts are the voice assistant's: its instruction and its demonstrations, then labelled
training requests, as many as there is room for. Each prompt begins as the shorter one, and what any
of them shows is trained on by none, so that all learn from the same requests. A cell is a size and
a seed; its result is one line of `results/long_prompts.jsonl`. When all are there,
docs/long-prompts.svg is drawn. Whoever stops it loses the cell under way alone. The protocol is in
docs/results.md.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from opcd.config.settings import gather
from opcd.models.by_name import load_tokenizer
from opcd.runtime.files import write_json, write_jsonl
from opcd.tasks.messages import Message, assistant, user
from opcd.tasks.template import Template
from studies.run import KEPT, RESULTS, ROOT, commit, device, measured, read, timed

TASK = ROOT / "examples" / "voice_assistant"
LABELLED = ROOT / "examples" / "own_experience" / "problems.jsonl"  # the same requests, with labels
BEGIN, END = "\nRequest: ", "\nLabel:"  # around a request there
SIZES = {"0.1k": 100, "1k": 1000, "4k": 4000}  # tokens that prompts come closest to
SEEDS = {"0.1k": (0,), "1k": (0,), "4k": (0, 1, 2)}
KEPT_AS = RESULTS / "long_prompts.jsonl"
PICTURE = ROOT / "docs" / "long-prompts.svg"
SMOKE = 2  # steps
Exchange = tuple[Message, Message]


class Prompts(NamedTuple):
    """The contexts by their sizes, and the requests that all of them are distilled on."""

    contexts: dict[str, list[Message]]
    training: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hours", type=float, default=float("inf"), help="start no cell after that"
    )
    parser.add_argument("--size", action="append", choices=SIZES, help="default: all")
    parser.add_argument(
        "--smoke", action="store_true", help=f"{SMOKE} steps a cell, first seeds; nothing is kept"
    )
    parser.add_argument("--draw", action="store_true", help="draw what is there, and end")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(read(KEPT_AS), PICTURE)
        return 0
    begin, found = time.monotonic(), read(KEPT_AS) if KEPT_AS.exists() else []
    done = {(row["size"], row["seed"]) for row in found if not arguments.smoke}
    cells = [(size, seed) for size, seeds in SEEDS.items() for seed in seeds]
    pending = [
        (size, seed)
        for size, seed in cells
        if size in (arguments.size or SIZES)
        and (size, seed) not in done
        and not (arguments.smoke and seed)
    ]
    for number, (size, seed) in enumerate(pending, 1):
        if time.monotonic() - begin > arguments.hours * 3600:
            print(f"{len(pending) - number + 1} cells left", flush=True)
            return 0
        row = carried_out(size, seed, arguments.smoke)
        if not arguments.smoke:
            with KEPT_AS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(pending)} {size} seed {seed}: {line(row)}", flush=True)
    if not arguments.smoke and len(rows := read(KEPT_AS)) == len(cells):
        draw(rows, PICTURE)
        print(f"drawn: {PICTURE}")
    return 0


def carried_out(size: str, seed: int, smoke: bool) -> dict[str, Any]:
    """Distil a context and score it; for a size's first seed, time the teacher both ways."""
    folder = ROOT / "runs" / "study" / f"long_prompts-{size}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = prompts(load_tokenizer(gather({}, TASK / "config.yaml").model))
    write_json(folder / "context.json", made.contexts[size])
    write_jsonl(folder / "train.jsonl", [{"prompt": text} for text in made.training])
    command = ["opcd.cli", "train", "--config", str(TASK / "config.yaml"), "--seed", str(seed)]
    command += ["--context", str(folder / "context.json")]
    command += ["--prompts", str(folder / "train.jsonl"), "--output_dir", str(folder / "run")]
    command += ["--elsewhere_prompts", "0", "--leak_tokens", "0", "--validate_every", "25"]
    command += ["--steps", str(SMOKE)] if smoke else []
    row: dict[str, Any] = {
        "size": size,
        "seed": seed,
        "demonstrations": sum(m["role"] == "assistant" for m in made.contexts[size]),
        "trained_on": len(made.training),
        "commit": commit(),
        "device": device(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "train_s": timed(command, folder),  # with its scorecard
    }
    row |= measured(folder / "run" / "metrics.jsonl")
    steps = [m for m in read(folder / "run" / "metrics.jsonl") if "step_time_s" in m]
    for part in ("rollout", "teacher", "update"):
        row[f"{part}_time_s"] = fmean(m[f"{part}_time_s"] for m in steps)
    card = json.loads((folder / "run" / "scorecard.json").read_text(encoding="utf-8"))
    row["scorecard"] = {name: card[name] for name in KEPT if name in card}
    if seed == SEEDS[size][0]:
        command = ["studies.teacher_times", str(folder / "run" / "config.yaml")]
        command += [str(folder / "teacher.json"), *(["--rounds", "1"] if smoke else [])]
        timed(command, folder)
        row["teacher"] = json.loads((folder / "teacher.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return row


def prompts(tokenizer: Any) -> Prompts:
    """The contexts, each of which the longer ones begin with."""
    front, *turns = json.loads((TASK / "context.json").read_text(encoding="utf-8"))
    own = [*zip(turns[::2], turns[1::2], strict=True)]
    training = [row["prompt"] for row in read(TASK / "train.jsonl")]
    shown = [*own, *in_rounds(training, labels())]
    template = Template(tokenizer, {}, date.today())
    alone = len(template.ids([user("?")]))

    def context(count: int) -> list[Message]:
        return [front, *(turn for exchange in shown[:count] for turn in exchange)]

    def tokens(count: int) -> int:
        return len(template.ids([*context(count), user("?")])) - alone

    size = len({said["content"] for _, said in own})  # of a round, in which each label stands once
    counts = range(size, len(shown), size)
    lengths = {count: tokens(count) for count in counts}
    chosen = {
        name: min(counts, key=lambda count: abs(lengths[count] - wanted))
        for name, wanted in SIZES.items()
    }
    taken = {asked["content"] for asked, _ in shown[: max(chosen.values())]}
    left = [text for text in training if text not in taken]
    return Prompts({name: context(count) for name, count in chosen.items()}, left)


def labels() -> dict[str, str]:
    """The labels of requests."""
    rows = {row["prompt"]: row["answer"] for row in read(LABELLED)}
    return {prompt.split(BEGIN, 1)[1].removesuffix(END): answer for prompt, answer in rows.items()}


def in_rounds(requests: Sequence[str], label_of: dict[str, str]) -> list[Exchange]:
    """Requests with their labels, each label once a round, in an order of the round's own."""
    draw = random.Random(0)
    by_label: dict[str, list[str]] = {}
    for request in requests:
        by_label.setdefault(label_of[request], []).append(request)
    for same in by_label.values():
        draw.shuffle(same)
    rounds = [[*one] for one in zip(*by_label.values(), strict=False)]
    for one in rounds:
        draw.shuffle(one)
    return [(user(text), assistant(label_of[text])) for one in rounds for text in one]


def line(row: dict[str, Any]) -> str:
    """A result in a line."""
    columns = row["scorecard"]["contenders"]
    words = [f"{row['scorecard']['prompt_tokens_saved']:.0f} tokens"]
    words += [f"{who} {columns[who]['accuracy']:.1%}" for who in ("prompted", "distilled")]
    words.append(f"{row['train_s']:.0f} s, {row['step_time_s']:.1f} s a step")
    if teacher := row.get("teacher"):
        words.append(
            "teacher {shared_s:.2f} s a step, in full {full_s:.2f} s, prefix once "
            "{prefix_s:.2f} s".format(**teacher)
        )
    return ", ".join(words)


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """What prompts of each length reach, and what they cost, as an SVG."""
    from benchmarks.plots import LINE, OURS, PEER, QUIET, STYLE, plt

    tokens = {row["size"]: row["scorecard"]["prompt_tokens_saved"] for row in rows}
    sizes = sorted(tokens, key=lambda size: tokens[size])
    x = [tokens[size] for size in sizes]
    of = {size: [row for row in rows if row["size"] == size] for size in sizes}
    with plt.rc_context(STYLE):
        figure, (reached, cost) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        for who, colour, mark in (("prompted", PEER, "s"), ("distilled", OURS, "o")):
            columns = {s: [r["scorecard"]["contenders"][who] for r in of[s]] for s in sizes}
            means = [100 * fmean(c["accuracy"] for c in columns[size]) for size in sizes]
            reached.plot(x, means, f"{mark}-", color=colour, label=who)
            for place, size in zip(x, sizes, strict=True):
                for column in columns[size]:
                    low, high = (100 * bound for bound in column["accuracy_interval_95"])
                    reached.plot([place] * 2, [low, high], color=colour, alpha=0.5, linewidth=1)
        reached.set(ylim=(0, 102), title="right of the test requests, %, 95 % intervals")
        timed_rows = [next(row for row in of[size] if "teacher" in row) for size in sizes]
        for name, label, colour in (
            ("full_s", "teacher, in full", PEER),
            ("shared_s", "teacher, behind a shared prefix", OURS),
            ("prefix_s", "that prefix, once a run", LINE),
        ):
            cost.plot(
                x, [row["teacher"][name] for row in timed_rows], "o-", color=colour, label=label
            )
        sequences = timed_rows[0]["teacher"]["sequences"]
        whole = [fmean(row["step_time_s"] for row in of[size]) for size in sizes]
        cost.plot(x, whole, "s--", color=QUIET, label="a whole step of training")
        cost.set(yscale="log", title=f"seconds a step of {sequences} sequences")
        for axes in (reached, cost):
            axes.set(xscale="log", xlabel="tokens of the prompt")
            axes.set_xticks(x, [f"{n:.0f}" for n in x], minor=False)
            axes.minorticks_off()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.4, linewidth=0.5)
            axes.legend(frameon=False)
        device = rows[0]["device"].replace(", 1 cores", ", 1 core")
        figure.suptitle(device, x=0.01, ha="left", fontsize=8)
        figure.savefig(file, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
