"""The split of the public moderation set, on rows in its form that were made for this."""

import csv
import json
from pathlib import Path

import pytest

from studies.hatecheck import PARTS, SHOWN, WORDS, family, split, write_task

FAMILIES = 120


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("posts") / "cases.csv"
    columns = ("test_case", "label_gold", "ref_templ_id", "templ_id")
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(columns)
        for number in range(FAMILIES):
            for label in WORDS:
                for i in range(8):  # half of them variants, with a template of their own
                    variant = (f"{number}.0", 1000 + number) if i % 2 else ("", number)
                    writer.writerow((f"{label} {number} {i}", label, *variant))
    return file


def test_no_template_stands_in_two_parts(posts: Path) -> None:
    families = {name: {family(post) for post in part} for name, part in split(posts).items()}
    for name in PARTS:
        for other in {*PARTS} - {name}:
            assert not families[name] & families[other]
    assert families["shown"] <= {str(n) for n in range(FAMILIES)} - families["test"]


def test_labels_are_equally_frequent(posts: Path) -> None:
    parts = split(posts)
    wanted = {**{name: count for name, (_, count) in PARTS.items()}, "shown": max(SHOWN) // 2}
    for name, part in parts.items():
        for label in WORDS:
            assert sum(post["label_gold"] == label for post in part) == wanted[name]


def test_what_is_shown_is_trained_on_by_none(posts: Path, tmp_path: Path) -> None:
    write_task(posts, tmp_path / "task")
    train = (tmp_path / "task" / "train.jsonl").read_text("utf-8")
    assert "answer" not in train
    for count in SHOWN:
        turns = json.loads((tmp_path / "task" / f"context-{count}.json").read_text("utf-8"))
        shown = [turn["content"] for turn in turns if turn["role"] == "user"]
        assert len(shown) == count
        assert not any(json.dumps(text) in train for text in shown)
