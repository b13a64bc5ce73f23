"""What studies run, where they keep it, and what they draw; nothing is trained."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from opcd.config.settings import gather
from opcd.studies.catalogue import NAMES
from studies import long_prompts
from studies import run as study
from studies.table import table
from tests.conftest import tiny_tokenizer, write_jsonl

FILES = sorted((study.ROOT / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_cell_is_a_run_that_can_be_begun(file: Path) -> None:
    """Its task is there, and its settings are some; no two have one key."""
    runs = [*study.runs(file)]
    assert len({run.key for run in runs}) == len(runs)
    for run in runs:
        config = gather(run.settings, study.ROOT / "examples" / run.task / "config.yaml")
        config.check()
        assert len(Path(config.test_data or "").read_text("utf-8").splitlines()) >= 200
        assert run.measure != "rivals" or run.cell in NAMES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_rivals_that_share_a_folder_share_their_settings(file: Path) -> None:
    """Else `opcd rivals` refuses the second one, when the first is trained."""
    settings: dict[str, dict[str, Any]] = {}
    for run in study.runs(file):
        if run.measure == "rivals":
            assert settings.setdefault(run.group, run.settings) == run.settings


def test_the_studies_show_the_four_examples() -> None:
    """What is lost of each: rows of rivals and scorecards hold harm and elsewhere."""
    tasks = {
        run.task
        for name in ("rivals", "remedies")
        for run in study.runs(study.ROOT / "studies" / f"{name}.yaml")
        if run.cell in ("opcd", "neither") and "elsewhere_prompts" not in run.settings
    }
    assert tasks == {"voice_assistant", "policy", "structured_output", "safety"}


STEPS = [{"step": 1, "step_time_s": 2.0, "loss": 1.0, "divergence": 0.5}]
CARD: dict[str, Any] = {
    "contenders": {"distilled_prompted": {"accuracy": 0.5, "harm": {"mean": 0.25}}}
}
CARD |= {"distilled": "/a/path", "measured_by": {}}
CARD["elsewhere"] = {"agreement": {"mean": 0.75}, "reverse_kl": {"mean": 0.5}}


@pytest.fixture
def studied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands of studies, which leave what the real ones do."""
    commands: list[list[str]] = []

    def done(command: Sequence[str], folder: Path) -> float:
        commands.append([*command])
        given = dict(zip(command[2::2], command[3::2], strict=True))
        out = Path(given["--output_dir"])
        if command[1] == "train":
            (out / "final").mkdir(parents=True)
            (out / "final" / "selection.json").write_text('{"step": 3}')
            write_jsonl(out / "metrics.jsonl", STEPS)
            (out / "scorecard.json").write_text(json.dumps(CARD))
        else:
            kept = out / "rivals" / "rivals.jsonl"
            kept.parent.mkdir(parents=True, exist_ok=True)
            first = {"opcd": ["base", "prompted"]}.get(given["--rival"], [])
            rows = study.read(kept) if kept.exists() else []
            rows += [{"rival": name, "accuracy": 0.5} for name in [*first, given["--rival"]]]
            write_jsonl(kept, rows)
        return 9.0

    monkeypatch.setattr(study, "timed", done)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "output", lambda *_: "abc")
    monkeypatch.setattr(study, "_model_of", lambda task: "tiny")
    (tmp_path / "s.yaml").write_text(
        "stages:\n"
        "  one: {tasks: [a, b], seeds: [0, 1], measure: rivals, cells: {opcd: , other_context: }}\n"
        "  two: {tasks: [a], seeds: [0], measure: rivals, cells: {demonstrations: }}\n"
        "  three: {tasks: [a], seeds: [0], measure: scorecard, cells: {x: {steps: 3}}}\n"
    )
    return commands


def test_a_commit_is_marked_where_more_than_results_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "ROOT", tmp_path)
    page, kept = tmp_path / "page.md", tmp_path / "studies" / "results" / "s.jsonl"
    kept.parent.mkdir(parents=True)
    for part in study.PARTS:
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / "code.py").touch()
    page.touch()
    kept.touch()
    me = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    for words in (("init", "-q"), ("add", "."), (*me, "commit", "-qm", "first")):
        study.output("git", *words)
    kept.write_text("{}")
    page.write_text("more")
    clean = study.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    new = tmp_path / "opcd" / "new.py"
    new.touch()
    assert study.commit() == f"{clean}-dirty"
    new.unlink()
    (tmp_path / "examples" / "code.py").write_text("x = 1")
    assert study.commit() == f"{clean}-dirty"


def carry_out(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run", str(study.ROOT / "s.yaml"), *arguments])
    assert study.main() == 0


def test_rivals_share_a_folder_and_scorecards_are_kept(
    studied: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = study.ROOT / "runs" / "study"
    carry_out(monkeypatch, "--stage", "one", "--model", "tiny=/some/where/weights")
    assert study.read(study.RESULTS / "s.jsonl")[0]["weights"] == "weights"
    assert [path.name for path in work.iterdir()] == ["rivals-a-0"], "stage two needs it"
    carry_out(monkeypatch)
    assert [*work.iterdir()] == []
    rows = study.read(study.RESULTS / "s.jsonl")
    assert len(rows) == len(studied) == 10
    names = [[rival["rival"] for rival in row.get("rivals", ())] for row in rows]
    assert names[:2] == [["base", "prompted", "opcd"], ["other_context"]]
    assert names[8:] == [["demonstrations"], []]
    assert studied[1][-2:] == ["--other_context", "examples/b/context.json"]
    assert studied[3][-2:] == ["--other_context", "examples/a/context.json"]
    assert "--other_context" not in studied[0]
    assert rows[-1]["selected"] == 3
    card: dict[str, Any] = rows[-1]["scorecard"]
    assert set(card) == {"contenders", "elsewhere"}, "no paths"
    assert "--test_data" not in studied[-1], "its own"
    assert studied[-1][-2:] == ["--steps", "3"]
    carry_out(monkeypatch)
    assert len(studied) == 10, "nothing again"


def test_tables_are_means_over_seeds() -> None:
    def rival(name: str, accuracy: float, harm: float | None = None) -> dict[str, Any]:
        cost = {"train_s": 10.4, "tokens": 900} if name == "opcd" else {"train_s": 0.0, "tokens": 0}
        rest = {"prompt_tokens": 20.0, "elsewhere": 0.5, "extra_work": "none", **cost}
        rest["interval_95"] = [accuracy - 0.1, accuracy + 0.1]
        return {"rival": name, "accuracy": accuracy, "harm": harm, **rest}

    rows = [
        {"task": "a", "cell": "opcd", "rivals": [rival("base", 0.0), rival("opcd", 0.8, 0.1)]},
        {"task": "a", "cell": "opcd", "rivals": [rival("base", 0.0), rival("opcd", 0.9, 0.2)]},
    ]
    *_, base, opcd = table(rows).splitlines()
    assert base.startswith(
        "| base | 2 | 0.0% (0.0% – 0.0%) | -10.0% – 10.0%, -10.0% – 10.0% | 20 |"
    )
    assert base.endswith("| – | – | – | none |")
    intervals = "70.0% – 90.0%, 80.0% – 100.0%"
    assert opcd.startswith(f"| opcd | 2 | 85.0% (80.0% – 90.0%) | {intervals} | 20 | 50.0% (")
    assert opcd.endswith("| 15.0% (10.0% – 20.0%) | 10 | 900 | none |")
    of = {"distilled": {"accuracy": 0.5}} | CARD["contenders"]
    scored = {"task": "a", "cell": "x", "train_s": 60}
    card = CARD | {"contenders": of}
    last = table([scored | {"scorecard": card}]).splitlines()[-1]
    reached = "50.0%; given back 50.0%; harm 25.0%; elsewhere 75.0%, 0.50 nats a token"
    assert last == f"| x | {reached} | 60 |"
    del card["elsewhere"]
    last = table([scored | {"scorecard": card}]).splitlines()[-1]
    assert last == "| x | 50.0%; given back 50.0%; harm 25.0%; elsewhere – | 60 |"


def test_a_smoke_run_keeps_to_itself(
    studied: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out(monkeypatch, "--smoke", "--task", "a", "--cell", "opcd", "--cell", "x")
    assert len(studied) == 2, "of the first seed"
    assert all(command[command.index("--steps") + 1] == "2" for command in studied)
    assert not study.RESULTS.exists()


def test_a_name_that_no_stage_has_is_said(
    studied: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, message in (
        (("--cell", "opdc"), "--cell must be one of demonstrations, opcd, other_context, x, got"),
        (("--task", "c"), "--task must be one of a, b, got c"),
        (("--stage", "four"), "--stage must be one of one, two, three, got four"),
    ):
        with pytest.raises(SystemExit, match=message):
            carry_out(monkeypatch, *given)
    assert not studied


def test_long_prompts_begin_as_shorter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bytes, so that sizes are larger here; nothing that is shown is trained on."""
    monkeypatch.setattr(long_prompts, "SIZES", {"s": 500, "m": 4000, "l": 16000})
    made = long_prompts.prompts(tiny_tokenizer())
    small, middle, large = made.contexts.values()
    assert small[0]["role"] == "system"
    assert large[: len(middle)] == middle
    assert middle[: len(small)] == small
    bytes_of = [sum(len(m["content"].encode()) for m in c) for c in made.contexts.values()]
    assert 16000 * 0.6 < bytes_of[2] < 16000
    shown = {m["content"] for m in large if m["role"] == "user"}
    assert len(shown) == len(large) // 2 - 1, "the example shows one request twice"
    assert not shown & set(made.training)
    added = large[len(json.loads((long_prompts.TASK / "context.json").read_text())) :]
    said = [m["content"] for m in added if m["role"] == "assistant"]
    assert {said.count(label) for label in said} == {len(said) // 4}
    assert len({tuple(said[i : i + 4]) for i in range(0, len(said), 4)}) > 3, "no fixed order"


def test_the_picture_of_long_prompts(tmp_path: Path) -> None:
    rows = [
        {
            "size": f"{n}",
            "seed": 0,
            "device": "a machine",
            "step_time_s": 3.0,
            "teacher": {"shared_s": 0.5, "full_s": n / 100, "prefix_s": n / 1000, "sequences": 16},
            "scorecard": {
                "prompt_tokens_saved": n,
                "contenders": {
                    who: {"accuracy": 0.5, "accuracy_interval_95": [0.4, 0.6]}
                    for who in ("prompted", "distilled")
                },
            },
        }
        for n in (100, 1000)
    ]
    long_prompts.draw(rows, tmp_path / "one.svg")
    long_prompts.draw(rows, tmp_path / "two.svg")
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert drawn == (tmp_path / "two.svg").read_text(encoding="utf-8")
    assert "behind a shared prefix" in drawn
    assert ">1000<" in drawn
