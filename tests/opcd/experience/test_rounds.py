"""The whole loop on a tiny model: rounds kept and rolled back, killed and resumed, from a log."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opcd.cli import main
from opcd.config.fields import FIELDS
from opcd.errors import InputError
from opcd.experience import distilling, phases
from opcd.experience.final import COLUMNS
from opcd.experience.problems import read_problems
from opcd.experience.settings import REFUSED, read_settings
from opcd.runtime.alone import alone
from opcd.tasks.elsewhere import BUILT_IN
from opcd.tasks.messages import assistant, user
from tests.conftest import in_groups, write_jsonl
from tests.opcd.experience.loops import (
    assert_same,
    keep_whatever,
    killed_again_and_again,
    run,
    weights,
)

CHECKER = """
def check(completion, answers):
    if completion.startswith("!"):
        raise RuntimeError("exclamation")
    # Half of what a random model says.
    return bool(completion) and sum(map(ord, completion)) % 2 == int(answers[0])
"""
WORDS = "apple pear fig plum lime kiwi date melon grape peach cherry mango berry olive quince lemon"


@pytest.fixture
def task(settings: dict, tmp_path: Path, brief_model: Path) -> dict:
    """Problems, a checker and the fields of a short loop."""
    (tmp_path / "checker.py").write_text(CHECKER)
    rows = [
        {"prompt": f"{colour} {word}", "answer": str(i % 2)}
        for i, word in enumerate(WORDS.split())
        for colour in ("red", "blue", "dark")
    ]
    own = {
        "prompts": str(write_jsonl(tmp_path / "problems.jsonl", rows)),
        "scorer": f"python:{tmp_path / 'checker.py'}:check",
        "held_out_share": 0.5,
        "without_context": "Say it.",
        "model": str(brief_model),
        "steps": 3,
        "learning_rate": 3e-4,
        "max_completion_tokens": 4,
        "problems_per_round": 8,
        "attempts_per_problem": 4,
        "learn_from": "successes",
        "context_tokens": 180,
        "candidates": 1,
        "off_policy": False,
    }
    left_out = {"validation_data", "test_data", *REFUSED}
    return {k: v for k, v in settings.items() if k not in left_out} | own


@pytest.mark.usefixtures("kept_whatever")
def test_two_rounds_from_attempts_to_the_final_test(task: dict) -> None:
    full = {"off_policy": True, "elsewhere_prompts": 6, "candidates": 2, "rounds": 2}
    found = run(task | full)
    folder = found.folder
    assert [row["accepted"] for row in found.rounds] == [True, True]
    assert found.rounds[0]["began_with"] == task["model"]
    assert found.rounds[1]["began_with"] == str(folder / "round-1" / "run" / "final")
    assert list(found.columns) == list(COLUMNS)
    first, second = weights(folder), weights(folder, 2)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    off_policy = weights(folder, 2, "off_policy")
    assert any(not torch.equal(off_policy[name], second[name]) for name in first)

    tried = json.loads((folder / "round-1" / "attempts.json").read_text())["attempts"]
    again = json.loads((folder / "round-2" / "attempts.json").read_text())["attempts"]
    assert len({json.dumps(a["problem"]) for a in tried}) == 8
    assert tried != again
    right = {a["turns"][0]["content"] for a in tried if a["value"] == 1}
    (context,) = found.rounds[0]["winners"]
    messages = json.loads((folder / "round-1" / "candidates" / context).read_text())
    assert messages[0] == {"role": "system", "content": "Say it."}
    assert {m["content"] for m in messages if m["role"] == "assistant"} <= right
    shown = {m["content"] for m in messages if m["role"] == "user"}
    trained = [
        json.loads(line)["messages"][0]["content"]
        for line in (folder / "round-1" / "prompts.jsonl").read_text().splitlines()
    ]
    assert shown
    assert trained
    assert not shown & set(trained)

    report = (folder / "report.md").read_text()
    assert "| distilled |" in report
    assert messages[1]["content"] in report
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 2
    with pytest.raises(InputError, match="must not hold a loop yet"):
        run(task | full)
    with pytest.raises(InputError, match="looked at once"):
        run(task | full, resume=True, rounds=3)
    with pytest.raises(InputError, match="must keep its settings, got other values for steps"):
        run(task | full, resume=True, steps=4)


@pytest.mark.usefixtures("kept_whatever")
def test_a_loop_killed_in_each_phase_resumes_to_the_same_result(
    task: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task | {"elsewhere_prompts": 3, "steps": 2}
    whole = run(task | {"output_dir": str(tmp_path / "whole")})
    found, deaths = killed_again_and_again(task, monkeypatch)
    assert deaths > 9
    assert_same(found, whole)


def test_a_loop_in_a_relative_folder_goes_on(
    task: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is finished, whose off-policy runs are looked at once more."""
    keep_whatever(monkeypatch)
    monkeypatch.chdir(tmp_path)
    task = task | {"output_dir": "loops/mine", "steps": 2}
    assert run(task, stop_after=1).stopped
    found = run(task, resume=True)
    assert not found.stopped
    assert run(task, resume=True).rounds == found.rounds
    (tmp_path / "loops" / "mine" / "round-2").mkdir()
    with pytest.raises(InputError, match=r"none less than were begun, got rounds 1 where .* has 2"):
        run(task, resume=True)


ELSEWHERE = """
import sys
import pytest
from opcd.cli import main
from tests.opcd.experience.loops import keep_whatever

with pytest.MonkeyPatch.context() as patch:
    keep_whatever(patch)
    sys.exit(main(["experience", "--config", *sys.argv[1:]]))
"""


def killed_once(there: Callable[[], bool], *arguments: str) -> None:
    """Runs a loop in a process of its own, and kills that outright once something is there."""
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not there():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline, "the loop does not get on"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.usefixtures("kept_whatever")
def test_kill_9_behind_the_attempts_and_in_the_distillation(task: dict, tmp_path: Path) -> None:
    task = task | {"elsewhere_prompts": 3, "steps": 16, "save_every": 2}
    whole = run(task | {"output_dir": str(tmp_path / "whole")})
    config, loop = str(command(task, tmp_path)), Path(task["output_dir"]) / "round-1"
    killed_once((loop / "attempts.json").is_file, config)
    assert not (loop / "run" / "metrics.jsonl").exists(), "in what follows the attempts"
    killed_once(lambda: len(steps_in(loop / "run")) >= 3, config, "--resume")
    assert len(steps_in(loop / "run")) < 16
    found = run(task, resume=True)
    assert_same(found, whole)


def steps_in(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def test_a_bad_round_is_rolled_back_and_the_next_begins_from_the_weights_before(
    task: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A huge rate, the gate as it is."""
    real = phases.ranked
    monkeypatch.setattr(
        phases,
        "ranked",
        lambda made, *rest: real(made, *rest) | {"winners": [made[0]["file"]]},
    )
    found = run(task, rounds=2, learning_rate=1e3)
    assert [row["accepted"] for row in found.rounds] == [False, False]
    assert [row["began_with"] for row in found.rounds] == [task["model"]] * 2
    assert all(row["distilled"] or "diverged" in row["reason"] for row in found.rounds)
    assert "rolled back" in (found.folder / "report.md").read_text()
    assert set(found.columns) == {"base", "base_experienced"}


def test_training_that_diverges_is_a_round_rolled_back(
    task: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = phases.ranked
    monkeypatch.setattr(
        phases,
        "ranked",
        lambda made, *rest: real(made, *rest) | {"winners": [made[0]["file"]]},
    )
    found = run(task, learning_rate=1e30, max_grad_norm=1e30)
    assert not found.rounds[0]["accepted"]
    assert "training diverged: the loss must be finite" in found.rounds[0]["reason"]


def test_a_harmful_context_is_not_distilled(task: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "train", lambda *_: pytest.fail("nothing was to be distilled"))
    real = phases.Bench.measure

    def worse(
        self: object, name: str, requests: Path, problems: list, context=None, **more: bool
    ) -> object:
        found = real(self, name, requests, problems, context, **more)
        return found._replace(values=[0.0 if context else 1.0] * len(problems))

    monkeypatch.setattr(phases.Bench, "measure", worse)
    (row,) = run(task).rounds
    assert row["reason"] == (
        "none of 1 contexts is better on validation than no experience (the best 0.0%, without "
        "100.0%)"
    )
    assert [c["accuracy"] for c in row["candidates"]] == [0.0]


def test_problems_that_are_measured_on_are_not_replayed(task: dict, tmp_path: Path) -> None:
    """Nor requests elsewhere: neither is in what a round's training sees."""
    parts = read_problems(read_settings(task, None).training)
    own, built_in = parts.validation[0].text, json.loads(BUILT_IN.read_text().splitlines()[0])
    for text in (own.upper(), parts.test[0].text, built_in["prompt"]):
        rows = write_jsonl(tmp_path / "again.jsonl", [{"prompt": "Good day"}, {"prompt": text}])
        change = {"replay_share": 0.25, "replay_data": str(rows), "elsewhere_prompts": 300}
        with pytest.raises(InputError, match=r"again.jsonl:2: a prompt that is replayed must not"):
            run(task | change)


def test_no_success_in_a_round_and_no_verdict_at_all(task: dict, tmp_path: Path) -> None:
    (tmp_path / "checker.py").write_text("def check(completion, answers):\n    return 0")
    (row,) = run(task).rounds
    assert (
        row["reason"]
        == "nothing to learn from: no item was written, and 0 of 32 attempts are right"
    )
    (tmp_path / "checker.py").write_text("def check(completion, answers):\n    return 1 / 0")
    with pytest.raises(InputError, match=r"must be judged, but of 6 none was.*ZeroDivision"):
        run(task | {"output_dir": str(tmp_path / "other")})


@pytest.mark.usefixtures("kept_whatever")
def test_each_prompt_names_an_experience_of_its_own(task: dict) -> None:
    found = run(task, experiences=2, candidates=6)
    assert len(found.rounds[0]["winners"]) == 2
    rows = [
        json.loads(line)
        for line in (found.folder / "round-1" / "prompts.jsonl").read_text().splitlines()
    ]
    named = {Path(name).stem for name in found.rounds[0]["winners"]}
    assert {row["context"] for row in rows} == named
    several = json.loads((found.folder / "round-1" / "experiences.json").read_text())
    assert set(several) == named


@pytest.mark.usefixtures("kept_whatever")
def test_a_log_in_place_of_attempts_without_texts_in_the_report(
    task: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = ["- EXPERIENCE ITEM: secret one.", "- EXPERIENCE ITEM: secret two."]
    monkeypatch.setattr(phases, "written_items", lambda *_: items)
    rows = [
        {"prompt": f"green {w}", "completion": w[0], "outcome": i % 2}
        for i, w in enumerate(WORDS.split())
    ]
    measured_on = [json.loads(line) for line in Path(task["prompts"]).read_text().splitlines()]
    log = write_jsonl(tmp_path / "served.jsonl", [*rows, measured_on[0] | {"completion": "x"}])
    with log.open("a") as file:
        file.write("{broken\n")
    files = {
        "validation_data": str(write_jsonl(tmp_path / "v.jsonl", measured_on[:10])),
        "test_data": str(write_jsonl(tmp_path / "t.jsonl", measured_on[10:20])),
    }
    found = run(
        task, **files, log=str(log), without_texts=True, learn_from="both", context_tokens=150
    )
    (row,) = found.rounds
    assert row["attempts"]["right"] == 8
    assert row["attempts"]["dropped"] == {
        "lines that hold no answered conversation": 1,
        "at validation or test problems": 1,
    }
    assert {c["kind"] for c in row["candidates"]} == {"items", "successes"}
    items_file = found.folder / "round-1" / "candidates" / "items-1.md"
    assert items_file.read_text().startswith("Say it.\n\nWhat earlier work")
    for name in ("report.md", "rounds.jsonl"):
        text = (found.folder / name).read_text()
        assert "secret" not in text
        assert "green" not in text
    with pytest.raises(InputError, match="learned from in one round"):
        run(task, **files, log=str(log), rounds=2)


def command(task: dict, tmp_path: Path) -> Path:
    own = {k: v for k, v in task.items() if k not in FIELDS}
    fields = {k: v for k, v in task.items() if k in FIELDS}
    path = tmp_path / "task.yaml"
    path.write_text(in_groups(fields) + "experience:\n")
    with path.open("a") as file:
        file.writelines(f"  {name}: {value}\n" for name, value in own.items())
    return path


@pytest.mark.usefixtures("kept_whatever")
def test_the_command(task: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = command(task, tmp_path)
    assert main(["experience", "--config", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 rounds accepted" in shown
    assert "round-1/run/final" in shown
    assert main(["experience", "--config", str(path), "--resume"]) == 0
    assert "distilled_experienced" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"context": "c.md"}, "context must not be set in the experience loop"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"elsewhere_loss": 3}, "0.03 is three points"),
        ({"test_sets": "{more: more.jsonl}"}, "test_sets must not be set in the experience loop"),
        ({"leak_tokens": 0}, "leak_tokens must not be set in the experience loop: a round m"),
        ({"attemps_per_problem": 2}, "did you mean attempts_per_problem?"),
        ({"learn_from": "failures"}, "learn_from must be one of both, items, successes"),
        ({"items_prompt": "none.md"}, "none.md', which is not there"),
    ],
)
def test_wrong_settings(
    changed: dict, says: str, task: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = command(task | changed, tmp_path)
    assert main(["experience", "--config", str(path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.usefixtures("kept_whatever")
def test_a_resumed_loop_must_find_what_it_was_begun_with(task: dict, tmp_path: Path) -> None:
    asks = tmp_path / "asks.md"
    asks.write_text("{problem} {attempt}")
    others = write_jsonl(tmp_path / "others.jsonl", [{"prompt": w} for w in ("hm", "ho", "hi")])
    task = task | {"items_prompt": str(asks), "elsewhere_data": str(others), "elsewhere_prompts": 3}
    found = run(task)
    (context,) = found.rounds[0]["winners"]
    context = found.folder / "round-1" / "candidates" / context
    for file, says in (
        (tmp_path / "checker.py", "another text of scorer"),
        (asks, "another text of items_prompt"),
        (others, "another text of elsewhere_data"),
        (tmp_path / "problems.jsonl", "must have the problems that it was begun with"),
        (context, "must be as the loop wrote it, got another text"),
    ):
        text = file.read_text()
        file.write_text(text.replace("red", "rot") if "red" in text else text + "\n")
        with pytest.raises(InputError, match=says):
            run(task, resume=True)
        file.write_text(text)
    assert run(task, resume=True).rounds == found.rounds
    filtered = found.folder / "round-1" / "filter.json"
    text = filtered.read_text()
    filtered.write_text(text.replace(json.dumps(context.name), '"../../../secret.md"'))
    with pytest.raises(InputError, match=r"must name contexts of this round, got '\.\./"):
        run(task, resume=True)
    filtered.write_text(text)
    pickled = found.folder / "round-1" / "run" / "final" / "pytorch_model.bin"
    pickled.write_bytes(b"")
    with pytest.raises(InputError, match="a file that loads by pickle"):
        run(task, resume=True)
    pickled.unlink()
    context.unlink()
    with pytest.raises(InputError, match="must be as the loop wrote it, got none"):
        run(task, resume=True)


def test_a_folder_is_one_loops_at_a_time_and_holds_nothing_of_others(
    task: dict, tmp_path: Path
) -> None:
    folder = Path(task["output_dir"])
    with alone(folder, "loop"), pytest.raises(InputError, match="one loop's at a time"):
        run(task)
    (folder / "validation.jsonl").write_text("mine")
    with pytest.raises(InputError, match=r"files of yours .* with validation.jsonl; choose"):
        run(task)
    assert (folder / "validation.jsonl").read_text() == "mine"
    assert not (folder / "settings.json").exists()
    (folder / "validation.jsonl").unlink()
    (folder / "settings.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r"with settings.json; choose"):
        run(task)
    # One that never came to its first phase is begun anew.
    (folder / "settings.json").unlink()
    with pytest.raises(InputError, match="must fit the model's 512 positions"):
        run(task, context_tokens=600)
    assert sorted(path.name for path in folder.glob("[!.]*.json*")) == [
        "settings.json",
        "validation.jsonl",
    ]
    (tmp_path / "checker.py").write_text("def check(completion, answers):\n    return 0")
    assert not run(task).rounds[0]["accepted"]


@pytest.mark.usefixtures("kept_whatever")
def test_of_a_log_what_does_not_fit_is_left_out(task: dict, tmp_path: Path) -> None:
    measured_on = [json.loads(line) for line in Path(task["prompts"]).read_text().splitlines()]
    rows = [{"prompt": f"green {w}", "completion": w, "outcome": 1} for w in WORDS.split()]
    turns = [user("dark fig"), assistant("fig"), user("blue fig"), assistant("fig")]
    long = {"prompt": "far " * 600, "completion": "no", "outcome": 1}
    told = [{"messages": turns, "outcome": 1}, long, *rows, long]
    files = {
        "log": str(write_jsonl(tmp_path / "served.jsonl", told)),
        "validation_data": str(write_jsonl(tmp_path / "v.jsonl", measured_on[:10])),
        "test_data": str(write_jsonl(tmp_path / "t.jsonl", measured_on[10:20])),
    }
    assert turns[0]["content"] in [row["prompt"] for row in measured_on[:10]]
    (row,) = run(task, **files).rounds
    assert row["attempts"]["dropped"] == {
        "at validation or test problems": 1,
        "that do not fit the model": 2,
    }
    assert row["attempts"]["right"] == len(rows)
    assert row["accepted"]
