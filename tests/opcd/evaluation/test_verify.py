"""A run held against its evidence: an honest one, and each way of making it say something else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opcd.cli import main
from opcd.config.settings import gather
from opcd.evaluation.evidence import FILE, text_digest, tree_digests
from opcd.evaluation.verify import AGREES, DIFFERS, UNKNOWN, Verified, verify
from opcd.preflight.check import check
from opcd.runtime.files import file_digest, read_jsonl, write_json, write_jsonl
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import prepare


def held(run: Path) -> Verified:
    return verify(run, gather({}, run / "config.yaml"))


def differing(run: Path) -> str:
    return "\n".join(check.what for check in held(run).checks if check.state == DIFFERS)


def changed(file: Path, change: Callable[[Any], None]) -> None:
    """Change what a JSON file holds."""
    found = json.loads(file.read_text(encoding="utf-8"))
    change(found)
    write_json(file, found)


def forge_digests(run: Path) -> None:
    """Make evidence.json name every file of the run as it is now, as somebody who cheats would."""

    def forge(evidence: dict[str, Any]) -> None:
        for name in evidence["outputs"]:
            evidence["outputs"][name] = file_digest(run / name)
        evidence["weights"]["out"]["files"] = tree_digests(run / "final")

    changed(run / FILE, forge)


def test_an_honest_run(copied_run: Path, capsys: pytest.CaptureFixture) -> None:
    found = held(copied_run)
    assert found.agrees
    assert {check.state for check in found.checks} == {AGREES}
    assert "every figure, from 10 answers again" in "\n".join(found.lines)
    assert found.evidence_sha256 == file_digest(copied_run / FILE)
    assert main(["verify", str(copied_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agrees"] is True


def test_evidence_has_what_a_doubter_asks_for(finished_run: Path) -> None:
    found = json.loads((finished_run / FILE).read_text())
    card = json.loads((finished_run / "scorecard.json").read_text())
    assert found["inputs"].keys() == {"context", "prompts", "validation_data", "test_data"}
    context = found["inputs"]["context"]
    assert context["sha256"] == text_digest("Answer with one letter.")
    assert found["weights"]["in"]["files"].keys() >= {"model.safetensors", "config.json"}
    assert found["weights"]["out"]["files"].keys() >= {"model.safetensors", "selection.json"}
    assert found["settings"]["learning_rate"] == 3e-3
    assert found["seeds"] == {"run": 0, "intervals": 0}
    assert found["made_by"]["device"].startswith("cpu")
    assert found["measured_by"] == card["measured_by"]
    assert card["selection"]["trained_by"]["code_sha256"] == found["made_by"]["code_sha256"]


def test_edited_answers(copied_run: Path, capsys: pytest.CaptureFixture) -> None:
    rows = read_jsonl(copied_run / "answers.jsonl")
    rows[0]["distilled"] = rows[0]["accepted"][0]
    write_jsonl(copied_run / "answers.jsonl", rows)
    assert main(["verify", str(copied_run)]) == 1
    shown = capsys.readouterr().out
    assert "DIFFERS      the files of the run: answers.jsonl is another" in shown
    forge_digests(copied_run)
    told = differing(copied_run)
    assert "the files of the run" not in told, "every digest is right now"
    assert "line 1: distilled_right False, judged again True" in told
    assert "contenders.distilled.accuracy 0, from the answers 0.1" in told


@pytest.mark.parametrize(
    ("what", "change", "told"),
    [
        (
            "accuracy",
            lambda card: card["contenders"]["distilled"].update(accuracy=0.9),
            "contenders.distilled.accuracy 0.9, from the answers",
        ),
        (
            "an interval",
            lambda card: card["contenders"]["base"]["gap"]["interval_95"].__setitem__(0, 0.001),
            "contenders.base.gap.interval_95[0] 0.001, from the answers",
        ),
        (
            "a p value",
            lambda card: card["differences"]["gap_closed"].update(p_value=0.01),
            "differences.gap_closed.p_value 0.01",
        ),
        (
            "the verdict",
            lambda card: card["verdict"].update(word="learned"),
            'verdict.word "learned"',
        ),
        (
            "elsewhere",
            lambda card: card["elsewhere"]["agreement"].update(mean=1.0),
            "elsewhere.agreement.mean 1",
        ),
        ("the divergence", lambda card: card["divergence"].update(after=0.0), "divergence.after 0"),
        ("a contender", lambda card: card["contenders"].pop("base"), "contenders.base null"),
        (
            "the scorer",
            lambda card: card["measured_by"].update(scorer="contains"),
            "the scorer: exact is not what the scorecard was judged by",
        ),
        (
            "the test data",
            lambda card: card["measured_by"].update(test_data="0" * 64),
            "the test data: other requests",
        ),
    ],
)
def test_an_edited_scorecard_with_a_forged_digest(
    copied_run: Path, what: str, change: Callable[[dict], None], told: str
) -> None:
    changed(copied_run / "scorecard.json", change)
    assert differing(copied_run).startswith("the files of the run: scorecard.json is another")
    forge_digests(copied_run)
    assert told in differing(copied_run), what


def test_swapped_weights(copied_run: Path) -> None:
    file = copied_run / "final" / "model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    kept = weights[name].clone()
    save_file(weights | {name: kept + torch.finfo(kept.dtype).eps}, file, {"format": "pt"})
    assert differing(copied_run) == "the distilled model, final/: model.safetensors is another"
    (copied_run / "final" / "extra.py").write_text("")
    assert "extra.py was added" in differing(copied_run)
    shutil.rmtree(copied_run / "final")
    assert differing(copied_run) == "the distilled model: final/ is not there"


def test_evidence_that_leaves_something_out(copied_run: Path) -> None:
    changed(copied_run / FILE, lambda evidence: evidence["outputs"].pop("answers.jsonl"))
    assert differing(copied_run) == "the files of the run: answers.jsonl was added"
    changed(copied_run / FILE, lambda evidence: evidence["weights"].update(out=None))
    assert "final/: " in differing(copied_run)
    (copied_run / "metrics.jsonl").unlink()
    assert "metrics.jsonl is gone" in differing(copied_run)


def test_inputs_that_changed_and_that_are_not_here(copied_run: Path, tmp_path: Path) -> None:
    config = gather({}, copied_run / "config.yaml")
    other = tmp_path / "context.md"
    other.write_text("Answer with two letters.")
    config.context, config.prompts = str(other), str(tmp_path / "gone.jsonl")
    states = {check.what.partition(":")[0]: check.state for check in verify(copied_run, config)[0]}
    assert states["context"] == DIFFERS
    assert states["prompts"] == UNKNOWN
    assert states["test_data"] == AGREES


def test_other_settings(copied_run: Path) -> None:
    file = copied_run / "config.yaml"
    file.write_text(file.read_text().replace("temperature: 1.0", "temperature: 0.5"))
    assert "the settings in config.yaml: temperature" in differing(copied_run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must be a JSON object, got none: it is not there; `opcd eval` writes it"),
        ("{", "must be a JSON object, got none"),
        ("[]", "must be a JSON object, got list"),
        ('{"format": 7}', "must have format 1, got '7'"),
        ('{"format": 1, "outputs": 3}', "must be as opcd writes it, got TypeError"),
        ('{"format": 1, "outputs": {}}', "must be as opcd writes it, got KeyError: 'weights'"),
    ],
)
def test_what_is_no_evidence(
    copied_run: Path, text: str | None, message: str, capsys: pytest.CaptureFixture
) -> None:
    (copied_run / FILE).unlink()
    if text is not None:
        (copied_run / FILE).write_text(text)
    assert main(["verify", str(copied_run)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "row", [{}, {"prompt": 3}, {"prompt": [], "base_tokens": "x", "base": 1}], ids=str
)
def test_answers_that_opcd_does_not_write(copied_run: Path, row: dict) -> None:
    write_jsonl(copied_run / "answers.jsonl", [row])
    assert "the scorecard: answers that opcd does not write" in differing(copied_run)


def test_what_is_no_change_of_a_run_agrees(copied_run: Path, settings: dict) -> None:
    """A file manager's own files, and a check made once more."""
    (copied_run / "final" / ".DS_Store").write_bytes(b"of a file manager")
    assert held(copied_run).agrees, held(copied_run).lines
    config = gather({"output_dir": str(copied_run)}, copied_run / "config.yaml")
    setup = prepare(config, for_training=True)
    check(setup, lambda: 1.0, Progress(), None).write(copied_run)
    assert held(copied_run).agrees, held(copied_run).lines
