"""Scorecards side by side, and every answer in one table."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from opcd.cli import main
from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.compare import compare, comparison_table, draw_comparison
from opcd.evaluation.intervals import wilson_interval
from opcd.evaluation.report import draw_curve, scorecard_table
from opcd.training.evaluate import evaluate_run
from tests.conftest import tiny_llama, write_jsonl


def column(accuracy: float | None, **more: Any) -> dict:
    share = {"mean": 0.5, "interval_95": [0.4, 0.6], "requests": 100}
    judged = {
        "accuracy": accuracy,
        "accuracy_interval_95": wilson_interval(100 * (accuracy or 0), 100),
    }
    return {"n": 100, "greedy_agreement": share, **(judged if accuracy is not None else {}), **more}


def a_run(folder: Path, *accuracies: float | None, **measured: str) -> Path:
    names = ("base", "prompted", "distilled", "distilled_prompted")
    columns = {n: column(a) for n, a in zip(names, accuracies, strict=False)}
    if len(accuracies) > 3:
        columns["distilled_prompted"]["harm"] = {"mean": 0.125, "interval_95": [0.1, 0.2]}
    by = {"test_data": "t", "model": "m", "scorer": "exact", "elsewhere_data": "e"} | measured
    folder.mkdir(parents=True)
    card = {"contenders": columns, "measured_by": by}
    (folder / "scorecard.json").write_text(json.dumps(card))
    return folder


def test_six_runs_in_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [
        a_run(tmp_path / task / f"seed{i}", 0.1, 0.8, 0.7 + i / 20, 0.6, test_data=task, form=task)
        for task in ("intents", "policy")
        for i in range(3)
    ]
    target = tmp_path / "drawn"
    assert main(["eval", "--compare", *map(str, runs), "--save_to", str(target)]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[1].split() == [
        *("intents/seed0", "10.0%", "80.0%", "70.0%", "60.4%", "–", "78.1%"),
        *("–", "12.5%", "–", "100"),
    ]
    assert len([x for x in lines if "seed" in x and "%" in x]) == 6
    other = "other test_data than the first: policy/seed0, policy/seed1, policy/seed2"
    assert other in lines
    assert other.replace("test_data", "context, or form of prompts,") in lines
    picture = (target / "compare.svg").read_text()
    for name in ("intents/seed0", "policy/seed2", "distilled", "prompted", "base", "accuracy"):
        assert f">{name}<" in picture
    assert picture.count('<g id="ytick_') == 6
    draw_comparison(compare(runs), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == picture, "the same runs give the same file"
    assert main(["eval", "--compare", *map(str, runs), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 6


def test_where_nothing_is_judged_agreement_is_shown(tmp_path: Path) -> None:
    found = compare([a_run(tmp_path / "a", None, None, None), a_run(tmp_path / "b", None, None)])
    table = comparison_table(found).splitlines()
    assert table[1].split()[:4] == ["a", "50.0%", "50.0%", "50.0%"]
    assert table[2].split()[:4] == ["b", "50.0%", "50.0%", "–"]
    draw_comparison(found, tmp_path / "x.svg")
    assert "prompted model" in (tmp_path / "x.svg").read_text()


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    judged = a_run(tmp_path / "judged", 0.1, 0.2, 0.3)
    with pytest.raises(
        InputError, match=r"must hold a scorecard.json of opcd, got none in .*nowhere; name"
    ):
        compare([judged, tmp_path / "nowhere"])
    with pytest.raises(InputError, match="got unjudged without accepted answers beside others"):
        compare([judged, a_run(tmp_path / "unjudged", None, None)])
    with pytest.raises(InputError, match="each folder must be named once"):
        compare([judged, tmp_path / "unjudged" / ".." / "judged"])
    base = column(0.5)
    broken: list[Any] = [{}, {"contenders": []}, {"contenders": {"base": {"n": 1}}}]
    broken += [{"contenders": {"base": base, "distilled": base}}]
    broken += [{"contenders": {"base": base | {"accuracy": "1"}}, "measured_by": {}}]
    for number, card in enumerate(broken):
        (folder := tmp_path / str(number)).mkdir()
        (folder / "scorecard.json").write_text(json.dumps(card))
        with pytest.raises(InputError, match=r"must hold a scorecard.json of opcd, got none"):
            compare([judged, folder])
    assert main(["eval", "--compare", str(tmp_path / "nowhere")]) == 2
    assert "must hold a scorecard.json" in capsys.readouterr().err


def test_several_sets_are_scored_at_once(settings: dict, tmp_path: Path) -> None:
    """Each is what it is by itself, and all answers stand in one table."""
    rows = [{"prompt": w, "answer": w[0]} for w in ("zebra", "yak", "xerus", "ape, old", "emu")]
    far = write_jsonl(tmp_path / "far.jsonl", rows)
    tiny_llama(seed=4).save_pretrained(tmp_path / "distilled")
    config = TrainConfig(**settings | {"test_sets": {"far": str(far)}, "elsewhere_prompts": 5})
    folder, found = evaluate_run(config, str(tmp_path / "distilled"), str(tmp_path / "both"))
    alone = TrainConfig(**settings | {"test_data": str(far)})
    _, by_itself = evaluate_run(alone, str(tmp_path / "distilled"), str(tmp_path / "alone"))
    card = found.card["test_sets"]["far"]
    names = ("base", "prompted", "distilled", "distilled_prompted")
    for name in names:
        own = by_itself.card["contenders"][name]
        assert card["contenders"][name] == {k: own[k] for k in card["contenders"][name]}
    assert card["differences"]["learned"] == by_itself.card["differences"]["learned"]
    own = [
        {key: value for key, value in row.items() if not key.endswith("_nats")}
        for row in by_itself.answers
    ]
    assert found.test_sets["far"] == own
    assert found.card["contenders"]["base"]["n"] == 4
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert f"### far\n\n```\n{scorecard_table(card)}\n```" in report
    assert re.search(r"distilled against prompted: [+-]\d+\.\d points", report)
    with (folder / "answers.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 * 4 + 5 * 4 + 5 * 2
    row = next(r for r in table if (r["data"], r["row"], r["contender"]) == ("far", "4", "base"))
    assert row["prompt"] == "ape, old"
    assert row["accepted"] == "a"
    assert row["answer"] == found.test_sets["far"][3]["base"]
    assert float(row["right"]) == float(found.test_sets["far"][3]["base_right"])
    assert {r["contender"] for r in table if r["data"] == "elsewhere"} == {"original", "distilled"}


def test_sets_that_were_trained_on_are_refused(settings: dict, tmp_path: Path) -> None:
    far = write_jsonl(tmp_path / "far.jsonl", [{"prompt": "zebra", "answer": "z"}])
    shutil.copyfile(settings["prompts"], tmp_path / "copy.jsonl")
    for name, message in (
        ("copy.jsonl", r"must be disjoint .* got 12 overlaps: .*copy.jsonl:1 is .*prompts.jsonl:1"),
        ("test.jsonl", r"test.jsonl:1 is .*test.jsonl:1"),
        ("nowhere.jsonl", "evaluation data must be a file, got .*nowhere"),
    ):
        sets = {"far": str(far), "near": str(tmp_path / name)}
        with pytest.raises(InputError, match=message):
            evaluate_run(TrainConfig(**settings | {"test_sets": sets}), "none")
    for sets, message in (
        ({"test": str(far)}, "a name of test_sets must be a text other than train, validation, te"),
        ({"far": 3}, "test_sets must name a file for 'far', got 3"),
    ):
        with pytest.raises(InputError, match=message):
            TrainConfig(**settings | {"test_sets": sets}).check()
    lone = settings | {"test_data": None, "test_sets": {"far": str(far)}}
    with pytest.raises(InputError, match="test_sets must stand beside test data, got far alone"):
        evaluate_run(TrainConfig(**lone), "none")


def test_sets_are_found_from_their_file(settings: dict, tmp_path: Path) -> None:
    """In a configuration, and in the one that is written; on the command line from here."""
    from opcd.config.settings import gather, write_config

    (tmp_path / "config.yaml").write_text(
        f"data:\n  context: {settings['context']}\n  test_sets: {{far: far.jsonl}}\n"
        f"run:\n  output_dir: x\n"
    )
    config = gather({}, tmp_path / "config.yaml")
    assert config.test_sets == {"far": str(tmp_path / "far.jsonl")}
    write_config(config, tmp_path / "again.yaml")
    assert "far: far.jsonl" in (tmp_path / "again.yaml").read_text()
    assert gather({}, tmp_path / "again.yaml").test_sets == config.test_sets
    given = gather({"test_sets": "{far: near.jsonl}"}, tmp_path / "config.yaml")
    assert given.test_sets == {"far": str(Path.cwd() / "near.jsonl")}
    with pytest.raises(
        InputError, match=r"test_sets must be a mapping, like \{typos: typos.jsonl\}"
    ):
        gather({"test_sets": "far.jsonl"}, tmp_path / "config.yaml")


def test_drawing_leaves_a_callers_backend_alone(tmp_path: Path) -> None:
    """A notebook's own figures would stay blank."""
    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        rows = [{"step": 1, "loss": 1.0, "divergence": 0.5, "mean_completion_tokens": 3.0}]
        draw_curve(rows, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert matplotlib.get_backend() == "svg"
    finally:
        matplotlib.use(before)
