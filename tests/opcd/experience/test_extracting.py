"""From attempts to contexts: what is kept of them, and in which order."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.experience.attempts import Attempt, read_log
from opcd.experience.contexts import newest_within
from opcd.experience.items import (
    PLACES,
    PROMPT,
    distinct,
    items_in,
    read_prompt,
    repeats,
    request_for_items,
)
from opcd.experience.successes import demonstrations, diverse, successes
from opcd.tasks.messages import assistant, user


def attempt(problem: str, text: str, value: float | None = 1.0, **more: str) -> Attempt:
    return Attempt([user(problem)], [assistant(text)], value, **more)


def test_only_lines_that_are_items_are_kept() -> None:
    text = "Sure!\n- EXPERIENCE ITEM: Read twice.\n1. Add.\n - EXPERIENCE ITEM: \n- Experience"
    assert items_in(text + "\n  - EXPERIENCE ITEM: Check the sign.  ") == [
        "- EXPERIENCE ITEM: Read twice.",
        "- EXPERIENCE ITEM: Check the sign.",
    ]
    cut = "- EXPERIENCE ITEM: Read twice.\n- EXPERIENCE ITEM: Sha"
    assert items_in(cut, cut=True) == ["- EXPERIENCE ITEM: Read twice."]
    assert items_in("- EXPERIENCE ITEM: Sha", cut=True) == []
    said = [
        "- EXPERIENCE ITEM: Read twice.",
        "- EXPERIENCE ITEM: a",
        "- EXPERIENCE ITEM: read TWICE.",
    ]
    assert len(distinct(said)) == 2


def test_an_item_that_only_repeats_the_request_is_none() -> None:
    request = (
        "PROBLEM\nLena finds 7 buttons, Gita 28.\nWrite down how to begin, what to watch out for."
    )
    for echo in ("What to watch out for.", "Lena finds 7 **buttons**!", "gita 28"):
        assert repeats(f"- EXPERIENCE ITEM: {echo}", request)
    for own in ("Add what each one finds.", "Lena finds 7 buttons: add them.", "7 butt"):
        assert not repeats(f"- EXPERIENCE ITEM: {own}", request)


def test_the_model_is_told_what_is_known_and_no_answer() -> None:
    prompt = read_prompt(str(PROMPT), PLACES)
    shown = [
        request_for_items(prompt, attempt("2 + {attempt}", "5", value), reward)
        for value in (1.0, 0.0, None)
        for reward in (True, False)
    ]
    assert ["found right" in text for text in shown] == [True, False, False, False, False, False]
    assert ["found wrong" in text for text in shown] == [False, False, True, False, False, False]
    assert all("2 + {attempt}" in text and "{outcome}" not in text for text in shown)


def test_a_request_for_items_must_show_the_attempt(tmp_path: Path) -> None:
    (tmp_path / "own.md").write_text("What did you learn from {problem}?")
    with pytest.raises(InputError, match=r"\{attempt\}"):
        read_prompt(str(tmp_path / "own.md"), PLACES)


def test_a_problems_shortest_whole_success_is_shown() -> None:
    found = successes(
        [
            attempt("a", "it is long", 1.0),
            attempt("a", "short", 1.0),
            attempt("A ", "no", 0.5),
            attempt("b", "cut", 1.0, finish="length"),
            attempt("c", "<think>hm</think>thought", 1.0),
            attempt("d", "unknown", None),
        ]
    )
    assert [(a.problem[0]["content"], a.text) for a in found] == [("a", "short"), ("c", "thought")]
    assert [turn["role"] for turn in demonstrations(found)] == ["user", "assistant"] * 2


def test_answers_take_turns_and_the_shortest_are_wanted_most() -> None:
    found = successes(
        [attempt("x" * n, "common") for n in range(1, 9)]
        + [attempt("rare problem", "Rare."), attempt("another rare problem", "so rare")]
    )
    balanced, whole = (diverse(found, number, seed=0)[::-1] for number in (0, 1))
    assert [a.text for a in balanced] == ["common", "Rare.", "so rare"]
    assert [a.text for a in whole[:4]] == ["common", "Rare.", "so rare", "common"]
    assert [len(a.problem[0]["content"]) for a in whole if a.text == "common"] == [*range(1, 9)]
    others = [[a.problem for a in diverse(found, number, seed=0)] for number in (3, 5, 3)]
    assert others[0] == others[2] != others[1]
    assert all(len(other) == 5 for other in others)
    # By what is right, where that is known: the same label is said in many ways.
    told = [replace(a, accepted="rare" if "are" in a.text else "common") for a in found]
    assert [a.text for a in diverse(told, 0, seed=0)[::-1]] == [
        "common",
        "Rare.",
        "common",
        "so rare",
    ]
    assert diverse([], 0, seed=0) == []


def test_over_the_limit_the_newest_whole_items_stay() -> None:
    def tokens(chosen: list[str]) -> int:
        return 10 + sum(map(len, chosen))

    items = ["aaaa", "bb", "x" * 99, "cccc", "dd"]
    assert newest_within(items, 18, tokens) == ["bb", "cccc", "dd"]
    assert newest_within(items, 17, tokens) == ["cccc", "dd"]
    assert newest_within(items, 11, tokens) == []


def test_a_log_with_broken_lines(tmp_path: Path) -> None:
    said = {"messages": [{"role": "system", "content": "Route."}, user("hi")]}
    said["messages"].append({"role": "assistant", "content": "music"})
    lines = [
        json.dumps(said | {"outcome": True}),
        "",
        json.dumps(said)[:-9],
        json.dumps({"prompt": "no answer"}),
        json.dumps(said | {"outcome": 7}),
        "[1]",
        json.dumps({"prompt": "yo", "completion": "taxi", "outcome": 0.5}),
        json.dumps(said),
    ]
    path = tmp_path / "served.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    attempts, skipped = read_log(str(path))
    assert [(a.text, a.value, a.right) for a in attempts] == [
        ("music", 1.0, True),
        ("taxi", 0.5, False),
        ("music", None, False),
    ]
    assert attempts[0].problem == [user("hi")]
    assert list(skipped.values()) == [4]
    path.write_text("\n".join(lines[2:6]), encoding="utf-8")
    with pytest.raises(InputError, match=r"none in 4 lines; the first: .*served.jsonl:1: must be"):
        read_log(str(path))
    path.write_text("\n \n" + "\n".join(lines[3:6]), encoding="utf-8")
    with pytest.raises(InputError, match=r"none in 3 lines; the first: .*served.jsonl:3: "):
        read_log(str(path))


def test_a_broken_byte_costs_its_line_alone(tmp_path: Path) -> None:
    """As other encodings have, and a write that was cut."""
    said = [json.dumps({"prompt": text, "completion": "ja"}, ensure_ascii=False) for text in "äöü"]
    first, second, third = (line.encode("utf-8") for line in said)
    cut = first[: first.index("ä".encode()) + 1]
    path = tmp_path / "served.jsonl"
    for mark, end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n"), (b"", b"\r")):
        lines = [first, said[1].encode("latin-1"), b"\0" * 9, third, second, cut]
        path.write_bytes(mark + end.join(lines))
        attempts, skipped = read_log(str(path))
        assert [a.problem[0]["content"] for a in attempts] == ["ä", "ü", "ö"]
        assert list(skipped.values()) == [3]
    path.write_bytes(said[1].encode("latin-1"))
    with pytest.raises(InputError, match=r"served.jsonl:1: must be JSON in UTF-8, got .*0xf6"):
        read_log(str(path))
    path.write_bytes("\n".join(said).encode("utf-16"))
    with pytest.raises(InputError, match="must be UTF-8 text, got UTF-16"):
        read_log(str(path))
    path.write_bytes(b" \n")
    with pytest.raises(InputError, match="must not be empty"):
        read_log(str(path))


ODD = [None, True, 0, -1.5, "", " ", "text", [], {}, ["text"], [None], [[]], [{}], {"a": {}}]
ODD += [[{"role": "user"}], [{"role": 1, "content": 2}], [{"role": "user", "content": None}]]
ODD += [[{"role": "tool", "content": "x"}], [{"role": "assistant", "content": "x"}]]


@pytest.mark.parametrize("place", ["messages", "prompt", "completion", "outcome", "body", "tools"])
def test_whatever_stands_in_a_line_it_is_read_or_skipped(place: str, tmp_path: Path) -> None:
    path = tmp_path / "served.jsonl"
    good: dict = {"prompt": "hi", "completion": "music"}
    rows = [{**good, place: odd} for odd in ODD] + [{place: odd} for odd in ODD]
    path.write_text("\n".join(map(json.dumps, [*rows, *ODD, good])), encoding="utf-8")
    attempts, skipped = read_log(str(path))
    assert attempts[-1].text == "music"
    assert len(attempts) + sum(skipped.values()) == len(rows) + len(ODD) + 1
