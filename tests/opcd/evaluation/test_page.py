"""report.html: what it holds, what it leaves out, and that a browser lays it out."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from opcd.cli import main
from opcd.config.settings import gather
from opcd.evaluation.page import LONGEST, Record, write_page
from opcd.evaluation.plots import _thinned, position_plot, training_plots
from opcd.runtime.files import read_jsonl, read_metrics, write_json
from tests.screenshots import browser_path, shots

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> \u202e\x00 \ud800"
MOST_BYTES = 300_000


class Tags(HTMLParser):
    """Every tag of a page with its attributes; raises for one that is not closed."""

    VOID = frozenset({"meta", "br", "use", "wbr", "path", "rect", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag


def record_of(run: Path, **settings: Any) -> Record:
    """What the page of a finished run was made from."""
    config = gather(settings, run / "config.yaml", caller="the test")
    card, evidence = (
        json.loads((run / f"{name}.json").read_text()) for name in ("scorecard", "evidence")
    )
    answers, elsewhere = (read_jsonl(run / f"{name}.jsonl") for name in ("answers", "elsewhere"))
    metrics = read_metrics(run / "metrics.jsonl")
    return Record(config, metrics, evidence, card, answers, elsewhere)


def written(run: Path, record: Record) -> str:
    write_page(run, record)
    return (run / "report.html").read_text(encoding="utf-8")


def test_a_run_leaves_a_page_that_stands_alone(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < MOST_BYTES
    tags = Tags(page).found
    names = [tag for tag, _ in tags]
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(names)
    assert not [a for _, attributes in tags for a in attributes if a.startswith("on")]
    addresses = [a[key] for _, a in tags for key in ("href", "xlink:href", "src") if key in a]
    assert all(str(address).startswith("#") for address in addresses)
    assert not re.search(r"https?://|url\((?!#)|@import", page)
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids)) > 50
    targets = {str(address)[1:] for address in addresses} | set(re.findall(r"url\(#([^)]*)", page))
    assert targets <= set(ids)


def test_headings_and_tables_can_be_read_aloud(finished_run: Path) -> None:
    tags = Tags((finished_run / "report.html").read_text(encoding="utf-8")).found
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = [tag for tag, _ in tags]
    assert names.count("table") == names.count("caption") >= 4
    scopes = {a.get("scope") for tag, a in tags if tag == "th"}
    assert scopes == {"col", "row", "rowgroup"}
    assert ("html", {"lang": "en"}) in tags


def test_a_page_says_what_the_scorecard_says(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    card = json.loads((finished_run / "scorecard.json").read_text())
    evidence = json.loads((finished_run / "evidence.json").read_text())
    assert f"<strong>{card['verdict']['word'].capitalize()}</strong>" in page
    assert card["verdict"]["reason"][1:] in page
    for name, column in card["contenders"].items():
        low, high = column["accuracy_interval_95"]
        assert f"{column['accuracy']:.1%}<small>{low:.1%} – {high:.1%}</small>" in page, name
    for heading in ("Scorecard", "Before and after", "Training", "Elsewhere", "Configuration"):
        assert f"<h2>{heading}</h2>" in page
    assert "What it saves" not in page
    assert "On a server" not in page
    assert evidence["weights"]["out"]["files"]["model.safetensors"] in page
    assert evidence["made_by"]["packages"]["torch"] in page
    assert page.count("<svg") == 5  # accuracy, divergence, validation, length, gap by position


def test_what_models_and_people_write_is_text(copied_run: Path) -> None:
    record = record_of(copied_run)
    for row in record.answers:
        row["distilled"] = HOSTILE  # type: ignore[index]
        row["accepted"] = [HOSTILE]  # type: ignore[index]
    for row in record.elsewhere:
        row["distilled"], row["same"] = "y" * 9999 + HOSTILE, False  # type: ignore[index]
    column = record.card["contenders"]  # type: ignore[index]
    for each in column.values():
        each["rates"] = {HOSTILE: {"mean": 0.5, "n": 3}}
    page = written(copied_run, record)
    tags = Tags(page).found
    assert not {"script", "img"} & {tag for tag, _ in tags}
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror") > 10
    assert "\x00" not in page
    assert "\u202e" not in page, "what turns the direction of the text behind it"
    assert "y" * (LONGEST - 1) + "…" in page
    assert len(page.encode()) < MOST_BYTES


def test_without_texts_nobodys_words_are_there(copied_run: Path) -> None:
    record = record_of(copied_run, without_texts=True, without_context="Hush, says Ms Ng.")
    classes = {"cat food": {"mean": 1.0, "n": 5}, "dog food": {"mean": 0.5, "n": 5}}
    for column in record.card["contenders"].values():  # type: ignore[index]
        column["rates"] = classes
    verdict = record.card["verdict"]  # type: ignore[index]
    verdict["reason"] = "50.0% now, but dog food 90.0% → 50.0%"
    summary = ["gap       0.25 nats a token; most is missed at 'Ng'", "verdict   go"]
    measured = record.card["measured_by"]  # type: ignore[index]
    write_json(copied_run / "check.json", {"measured_by": measured, "summary": summary})
    page = written(copied_run, record)
    for word in ("alert(1)", "Ms Ng", "food", "&#39;Ng&#39;"):
        assert word not in page, word
    said = [row[name] for row in record.answers for name in ("base", "prompted", "distilled")]
    said += [row["distilled"] for row in record.elsewhere]
    assert not [text for text in said if len(text) > 2 and text in page]
    assert "class 2" in page
    assert "0.25 nats a token" in page
    assert "Each answer now" in page, "how many is no word of anybody's"
    assert "food" in written(copied_run, record_of(copied_run)._replace(card=record.card))


def test_the_worst_answers_come_first(copied_run: Path) -> None:
    record = record_of(copied_run)
    for i, row in enumerate(record.answers):
        right = {"base_right": False, "prompted_right": True, "distilled_right": i != 7}
        row |= {**right, "distilled": "same", "prompted": "same"}
        row["distilled_nats"]["missed"] = [9.0 if i == 3 else 0.0]
    page = written(copied_run, record)
    shown = re.findall(r'<h3 class="text">.*?&amp; (\w+)</h3>', page)
    assert shown[:2] == ["oryx", "ant"]
    assert "less right than prompted</th><td>1</td>" in page
    assert "as right as prompted</th><td>9</td>" in page


SAVED = [["", "first token, ms"], ["prompted_cached", "12.0 (11.0 – 13.5)"], ["distilled", "–"]]


def test_savings_are_shown_where_they_were_measured(copied_run: Path) -> None:
    summary = ["keep <b>the</b> prompt", "by a server"]
    write_json(copied_run / "serving.json", {"summary": summary, "table": SAVED})
    page = written(copied_run, record_of(copied_run))
    assert "<h2>What it saves</h2>" in page
    verdict, table, by = (
        page.index(part)
        for part in (
            '<p class="says">keep &lt;b&gt;the&lt;/b&gt; prompt</p>',
            '<th scope="row">prompted cached</th><td>12.0<small>11.0 – 13.5</small></td>',
            "<li>by a server</li>",
        )
    )
    assert verdict < table < by, "the verdict first, and how last"
    assert page.index("<p>On a server: keep &lt;b&gt;the&lt;/b&gt; prompt</p>") < verdict
    assert '<th scope="row">distilled</th><td>–</td>' in page


def a_set(record: Record) -> dict[str, Any]:
    """One more set of test data, as a scorecard has it: the first one's, with a class's answer."""
    names = ("contenders", "differences", "constant")
    found = {name: record.card[name] for name in names if name in record.card}  # type: ignore[index]
    found = json.loads(json.dumps(found)) | {"file": "far.jsonl"}
    for column in found["contenders"].values():
        column["accuracy"] = 0.125
        column["rates"] = {"dog food": {"mean": 0.375, "n": 5}}
        column["balanced_accuracy"] = 0.25
    found["constant"] = {"answer": "dog food", "accuracy": 0.75}
    return found


@pytest.mark.parametrize("without_texts", [False, True])
def test_more_test_data_have_their_place(copied_run: Path, without_texts: bool) -> None:
    record = record_of(copied_run, without_texts=without_texts)
    record.card["test_sets"] = {"far <b>": a_set(record)}  # type: ignore[index]
    page = written(copied_run, record)
    Tags(page)
    whole, _, section = page.partition("<h2>Other test data</h2>\n<h3>far &lt;b&gt;</h3>")
    section, _, _ = section.partition("</section>")
    assert "Other test data" not in written(copied_run, record_of(copied_run))
    assert section.count("12.5%<small>") == len(record.card["contenders"])  # type: ignore[index]
    assert "12.5%" not in whole
    assert "37.5%" in section
    assert "<li>of far.jsonl</li>" in section
    assert re.search(r"<li>distilled against prompted: [+-]\d+\.\d points", section)
    assert ("dog food" in section) == (not without_texts)
    assert ("class 1" in section) == without_texts
    assert "one answer for all" in section


def test_a_run_without_test_data_has_a_page(copied_run: Path) -> None:
    record = record_of(copied_run)._replace(card=None, answers=[], elsewhere=[])
    page = written(copied_run, record)
    assert "<strong>Not measured</strong>" in page
    assert page.count("<svg") == 3
    assert "Scorecard" not in page


def test_scored_again_without_texts_a_run_is_still_verified(copied_run: Path) -> None:
    config = str(copied_run / "config.yaml")
    before = (copied_run / "scorecard.json").read_bytes()
    assert "alert(1)" in (copied_run / "report.html").read_text(encoding="utf-8")
    assert main(["eval", "--config", config, f"--output_dir={copied_run}", "--without-texts"]) == 0
    assert json.loads(before)["contenders"] == record_of(copied_run).card["contenders"]  # type: ignore[index]
    for name in ("report.html", "evidence.json"):
        assert "alert(1)" not in (copied_run / name).read_text(encoding="utf-8")
    assert main(["verify", str(copied_run)]) == 0


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_the_contrast_of_aa(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    themes = [
        dict(re.findall(r"--(\w+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    ]
    assert len(themes) == 3  # light, dark, print
    for theme in themes:
        for name in ("ink", "quiet", "good", "fair", "poor", "none"):
            for ground in ("page", "panel"):
                assert contrast(theme[name], theme[ground]) >= 4.5, (name, theme)
        for i in range(2, 7):
            assert contrast(theme[f"s{i}"], theme["page"]) >= 3, (i, theme)


def test_a_long_run_has_no_larger_drawings() -> None:
    rows = [{"step": i, "loss": 1.0, "divergence": 1 / i, "mean_completion_tokens": 9.0} for i in
            range(1, 20_001)]  # fmt: skip
    divergence, length = training_plots(rows, 0.0)
    assert max(len(plot.svg) for plot in (divergence, length)) < 20_000
    assert _thinned([(1, 1.0), (2, 3.0)]) == [(1, 1.0), (2, 3.0)]
    assert training_plots([], 0.0) == []


def test_the_gap_by_position_is_a_mean_over_answers() -> None:
    found = position_plot({"base": [[1.0, 4.0], [3.0, 0.0], [2.0]], "distilled": [[0.5]] * 3})
    assert found is not None
    assert found.words == "base 2 → 2; distilled 0.5 → 0.5"  # the second place: two answers
    assert position_plot({}) is None


def test_a_browser_lays_it_out_at_two_widths(copied_run: Path, tmp_path: Path) -> None:
    """Light and dark, nothing is fetched, complained of, or wider than phone and screen."""
    pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'"
    )
    if browser_path() is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    record = record_of(copied_run)
    long = "a_word_that_no_line_can_hold_" * 12
    for row in record.answers:
        row["distilled"] = long  # type: ignore[index]
    record.card["test_sets"] = {long: a_set(record)}  # type: ignore[index]
    table = [
        [*SAVED[0], *["requests/s"] * 9],
        *([*row, *["1.90 (1.64 – 1.97)"] * 9] for row in SAVED[1:]),
    ]
    write_json(copied_run / "serving.json", {"summary": [long, "more"], "table": table})
    write_page(copied_run, record)
    found = shots(copied_run / "report.html", tmp_path)
    assert [picture.name for picture in found] == [
        f"report-{width}-{scheme}.png" for width in (390, 1280) for scheme in ("light", "dark")
    ]
    assert list(found.values()) == [[]] * 4
    assert all(picture.stat().st_size > 20_000 for picture in found)
    (copied_run / "wide.html").write_text("<p style='width:2000px'>x<script src='y.js'></script>")
    found = shots(copied_run / "wide.html", tmp_path, height=100)
    assert all("y.js" in str(wrong) and "width:2000px" in str(wrong) for wrong in found.values())
