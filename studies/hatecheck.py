"""Moderation on a public set: HateCheck, read from a path.

    python -m studies.hatecheck test_suite_cases.csv                 # trains, if the prompt works
    python -m studies.hatecheck test_suite_cases.csv --model FOLDER

The set is Röttger et al. (ACL 2021, https://github.com/paul-rottger/hatecheck-data), CC-BY-4.0. It
is split by template, variants together with what they are variants of, so that no part shares one
with another; in each part both labels are equally frequent. Prompts of 16 and of 32
demonstrations are tried on the validation posts. The better one is distilled if its accuracy there
is 70 % or more and its interval lies above one label for all; the test posts are answered once. A
result is a line of `results/hatecheck.jsonl`, of figures alone.
"""

import argparse
import csv
import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from opcd.config.settings import gather
from opcd.runtime.files import write_json, write_jsonl
from studies.answers import reached
from studies.run import RESULTS, ROOT, commit, device, measured, timed

KEPT = RESULTS / "hatecheck.jsonl"
WORDS = {"hateful": "hateful", "non-hateful": "fine"}  # what a model answers
PARTS = {"test": (0.3, 120), "validation": (0.2, 100), "train": (0.5, 300)}  # templates; of a label
SHOWN = (16, 32)  # demonstrations
WORTH = 0.7
INSTRUCTION = (
    "You moderate posts. Reply with one word. hateful: the post attacks, insults, demeans or "
    "threatens people because of a group that they belong to (such as women, migrants, or a "
    "religion), also by a slur, in a question, or with odd spelling. fine: everything else, such "
    "as swearing at things, criticism of one person, kind words about a group, and quoting hate in "
    "order to reject it."
)
Post = dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("posts", type=Path, help="test_suite_cases.csv of HateCheck")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, or a folder")
    parser.add_argument("--name", help="of a model that is a folder, in the results")
    parser.add_argument("--lora_rank", type=int, default=0)
    given = parser.parse_args()
    folder = ROOT / "runs" / "hatecheck"
    shutil.rmtree(folder, ignore_errors=True)
    write_task(given.posts, folder)
    row: dict[str, Any] = {
        "model": given.name or given.model,
        "lora_rank": given.lora_rank,
        "commit": commit(),
        "device": device(),
        "validation": {n: prompted(n, given.model, folder) for n in SHOWN},
    }
    best = max(SHOWN, key=lambda n: row["validation"][n]["accuracy"])
    found = row["validation"][best]
    constant = 1 / len(WORDS)
    row["taken"] = found["accuracy"] >= WORTH and found["accuracy_interval_95"][0] > constant
    if row["taken"]:
        row |= trained(best, given.model, given.lora_rank, folder)
    with KEPT.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))
    shutil.rmtree(folder)
    return 0


def write_task(posts: Path, folder: Path) -> None:
    """The parts of the set, and a configuration for each number of demonstrations."""
    folder.mkdir(parents=True)
    parts = split(posts)
    for name, part in parts.items():
        labelled = name != "train"
        rows = [
            {"prompt": post["test_case"].strip()} | ({"answer": word(post)} if labelled else {})
            for post in part
        ]
        write_jsonl(folder / f"{name}.jsonl", rows)
    for count in SHOWN:
        turns = [{"role": "system", "content": INSTRUCTION}]
        for post in parts["shown"][:count]:
            turns.append({"role": "user", "content": post["test_case"].strip()})
            turns.append({"role": "assistant", "content": word(post)})
        write_json(folder / f"context-{count}.json", turns)


def split(posts: Path) -> dict[str, list[Post]]:
    """Posts of each part, and those that are shown, which are trained on by none."""
    with posts.open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    draw = random.Random(0)
    names = sorted({family(row) for row in rows})
    draw.shuffle(names)
    parts: dict[str, list[Post]] = {name: [] for name in (*PARTS, "shown")}
    begin = 0.0
    for part, (share, wanted) in PARTS.items():
        end = begin + share
        own = names[round(begin * len(names)) : round(end * len(names))]
        begin = end
        more = max(SHOWN) // len(WORDS) if part == "train" else 0
        for label in WORDS:
            families: dict[str, list[Post]] = {name: [] for name in own}
            for row in rows:
                if row["label_gold"] == label and family(row) in families:
                    families[family(row)].append(row)
            taken = [*islice(in_turns([*families.values()], draw), wanted + more)]
            parts["shown"] += taken[:more]
            parts[part] += taken[more:]
    for drawn in parts.values():
        draw.shuffle(drawn)
    half = {label: [p for p in parts["shown"] if p["label_gold"] == label] for label in WORDS}
    parts["shown"] = [post for pair in zip(*half.values(), strict=True) for post in pair]
    return parts


def family(row: Post) -> str:
    """The template that a post is made from; for a variant, that of the original."""
    number = row["ref_templ_id"] or row["templ_id"]
    return str(int(float(number)))


def in_turns(families: Sequence[Sequence[Post]], draw: random.Random) -> Iterator[Post]:
    """One post of each family, then a second of each, until all are gone."""
    piles = [draw.sample(family, len(family)) for family in families]
    while piles := [pile for pile in piles if pile]:
        for pile in piles:
            yield pile.pop()


def word(post: Post) -> str:
    """The right answer."""
    return WORDS[post["label_gold"]]


def settings(shown: int, model: str, folder: Path) -> dict[str, Any]:
    """Of a run with so many demonstrations: the example safety's, on these posts."""
    files = {f"{part}_data": str(folder / f"{part}.jsonl") for part in ("validation", "test")}
    context, prompts = folder / f"context-{shown}.json", folder / "train.jsonl"
    return {"model": model, "context": str(context), "prompts": str(prompts), **files}


def prompted(shown: int, model: str, folder: Path) -> dict[str, Any]:
    """What the model answers on validation posts with the prompt."""
    given = settings(shown, model, folder)
    given["test_data"] = given.pop("validation_data")
    return reached(gather(given | {"validation_data": None}, config_file()), model)["prompted"]


def trained(shown: int, model: str, lora_rank: int, folder: Path) -> dict[str, Any]:
    """Distil that prompt, and answer the test posts, before and after."""
    given, run = settings(shown, model, folder), folder / "run"
    own = {"output_dir": run, "lora_rank": lora_rank, "elsewhere_prompts": 0, "leak_tokens": 0}
    own |= {"learning_rate": None, "divergence_prompts": 8, "validate_every": 25}
    command = ["opcd", "train", "--config", str(config_file())]
    for name, value in (given | own).items():
        command += [f"--{name}", "null" if value is None else str(value)]
    seconds = timed(command, folder)
    card = json.loads((run / "scorecard.json").read_text(encoding="utf-8"))
    return {
        "demonstrations": shown,
        "train_s": seconds,
        **measured(run / "metrics.jsonl"),
        "scorecard": {k: card[k] for k in ("contenders", "constant", "differences", "verdict")},
    }


def config_file() -> Path:
    """The configuration that is trained by."""
    return ROOT / "examples" / "safety" / "config.yaml"


if __name__ == "__main__":
    sys.exit(main())
