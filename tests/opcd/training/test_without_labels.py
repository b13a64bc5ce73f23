"""A run of which nobody knows the right answers: context and requests are all there is."""

import json
from pathlib import Path

import pytest
import torch

from opcd.api.results import Distilled
from opcd.cli import main
from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.agreement import gap_between, student_side, teacher_side
from opcd.evaluation.observed import episodes_of
from opcd.models.by_name import load_model
from opcd.objective import head_logprobs
from opcd.runtime.files import read_metrics
from opcd.tasks.prepare import prepare
from opcd.tasks.task import read_task_files
from opcd.teacher import teacher_of
from opcd.training.build import build_distiller
from opcd.training.validation import Validation
from tests.conftest import in_groups, tiny_llama, write_jsonl

MEASURED = {"gap", "top1_agreement", "greedy_agreement", "divergence", "forward_kl"}
SHARES = {"empty_share", "commonest_share", "truncated_share"}


@pytest.fixture
def unlabelled(settings: dict) -> dict:
    """Sixty requests and nothing else."""
    rows = [{"prompt": f"say {i} in words"} for i in range(60)]
    write_jsonl(Path(settings["prompts"]), rows)
    return settings | {"validation_data": None, "test_data": None, "steps": 4}


def test_prompts_are_kept_out_and_measured_on(
    unlabelled: dict, capsys: pytest.CaptureFixture
) -> None:
    config = Path(unlabelled["output_dir"]).parent / "config.yaml"
    config.write_text(in_groups(unlabelled | {"validate_every": 2}))
    assert main(["train", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert (
        "of 60 prompts 42 are trained on, 6 to choose the checkpoint by and 12 to test" in printed
    )
    assert printed.count("has no answers: models are held against") == 1
    run = Path(unlabelled["output_dir"])
    rows = [row["validation"] for row in read_metrics(run / "metrics.jsonl") if "validation" in row]
    assert len(rows) == 3
    for row in rows:
        assert set(row) >= MEASURED | SHARES
        assert "accuracy" not in row
        assert set(row["prompted"]) == SHARES
    selection = json.loads((run / "final" / "selection.json").read_text())
    nearest = min(row["missed_kl"] for row in rows[1:])
    assert selection["validation"]["missed_kl"] == nearest
    assert "nats from the prompted model on its answers" in selection["how"]
    card = json.loads((run / "scorecard.json").read_text())
    columns = card["contenders"]
    assert list(columns) == ["base", "prompted", "distilled", "distilled_prompted"]
    assert columns["prompted"]["greedy_agreement"]["mean"] == 1.0
    assert all("accuracy" not in column for column in columns.values())
    assert columns["distilled"]["gap"]["mean"] < columns["base"]["gap"]["mean"]
    for name in ("gap", "top1_agreement", "reverse_kl", "forward_kl"):
        low, high = columns["distilled"][name]["interval_95"]
        assert low <= columns["distilled"][name]["mean"] <= high
    assert card["verdict"]["word"] == "too few requests"
    assert card["data"] == {"part": "held out", "file": unlabelled["prompts"]}
    assert "scored on requests kept out of" in printed
    closed = columns["base"]["gap"]["mean"] - columns["distilled"]["gap"]["mean"]
    assert card["differences"]["gap_closed"]["mean"] == pytest.approx(closed)
    assert "distilled" in repr(Distilled(run))
    assert card["verdict"]["reason"] in (run / "report.md").read_text()
    assert card["verdict"]["reason"] in printed
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert {"base", "prompted", "distilled"} <= set(answers[0])
    assert "accepted" not in answers[0]
    again = ["eval", "--config", str(run / "config.yaml")]
    assert main(again) == 0
    assert json.loads((run / "scorecard.json").read_text()) == card
    assert main([*again, "--held_out_share", "0.9"]) == 2, "most of those were trained on"
    assert "prompts or held_out_share give others" in capsys.readouterr().err
    labelled = [{"prompt": f"say {i} in words", "answer": i} for i in range(60)]
    write_jsonl(Path(unlabelled["prompts"]), labelled)
    assert main(again) == 0, "answers may come later"


def test_answers_beside_the_prompts_judge_what_is_kept_out(unlabelled: dict) -> None:
    rows = [{"prompt": f"say {i} in words", "answer": i} for i in range(60)]
    file = Path(unlabelled["prompts"])
    write_jsonl(file, rows)
    files = read_task_files(TrainConfig(**unlabelled | {"scorer": "number"}))
    for part in ("validation", "test"):
        assert files.parts[part]
        for example in files.parts[part]:
            assert example.text == f"say {example.answers[0]} in words"
    assert not any(e.answers for e in files.parts["train"])
    assert any("12 to test the model with, by the answers" in line for line in files.remarks)
    given = Path(unlabelled["prompts"]).read_text()
    write_jsonl(file, [{"prompt": row["prompt"], "label": 2} for row in rows])
    files = read_task_files(TrainConfig(**unlabelled))
    assert not any(e.answers for part in files.parts.values() for e in part)
    assert any("is not taken for answers: " in line for line in files.remarks), files.remarks
    file.write_text(given)
    del rows[7]["answer"]
    write_jsonl(file, rows)
    files = read_task_files(TrainConfig(**unlabelled))
    assert not any(e.answers for part in files.parts.values() for e in part)
    with pytest.raises(InputError, match="set held_out_share to 0"):
        read_task_files(TrainConfig(**unlabelled | {"scorer": "number"}))


def test_what_a_log_once_answered_is_not_what_counts_as_right(unlabelled: dict) -> None:
    rows = [{"prompt": f"say {i} in words", "completion": "Sure!"} for i in range(60)]
    write_jsonl(Path(unlabelled["prompts"]), rows)
    files = read_task_files(TrainConfig(**unlabelled))
    assert not any(e.answers for part in files.parts.values() for e in part)


def test_the_gap_is_that_of_whole_sequences(settings: dict) -> None:
    """Teacher minus student, each token's log p by all logits of whole sequences."""
    setup = prepare(TrainConfig(**settings))
    model = load_model(setup.config.model, torch.float32)
    other = tiny_llama(5)
    validation = Validation(build_distiller(setup), setup)
    cases = setup.task.validation
    episodes = episodes_of(cases, validation.said, cases)
    teacher = teacher_of(model, setup.task.prefixes, setup.config)
    plan = teacher.plan
    found = gap_between(
        student_side(other, plan, episodes, setup.config), teacher_side(teacher, episodes), 0.7
    )
    nats_of, firsts = found.nats, found.likeliest.totals
    sums = zip(nats_of.totals, nats_of.counts, firsts, strict=True)
    tokens = zip(found.missed, found.student_logprobs, strict=True)
    for episode, (nats, count, first), (missed, logprobs) in zip(
        episodes, sums, tokens, strict=True
    ):
        ids = torch.tensor(episode.scored_ids)
        ours, theirs = (
            (lm(torch.tensor([[*front]])).logits[0, -len(ids) - 1 : -1] / 0.7).log_softmax(-1)
            for lm, front in (
                (other, episode.student_ids),
                (model, [*setup.task.a_prefix, *episode.teacher_ids]),
            )
        )
        rows = torch.arange(len(ids))
        assert nats == pytest.approx((theirs - ours)[rows, ids].sum().item(), rel=1e-4)
        assert missed == pytest.approx((theirs - ours)[rows, ids].tolist(), abs=1e-4)
        assert logprobs == pytest.approx(ours[rows, ids].tolist(), abs=1e-4)
        assert first == (ours.argmax(-1) == ids).sum().item()
        assert count == len(ids)
        assert torch.equal(theirs.argmax(-1), ids), "the teacher's answers are greedy"


def test_logprobs_in_blocks_are_those_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from opcd.models.head import Head

    monkeypatch.setattr("opcd.objective.BLOCK", 7)
    monkeypatch.setattr("opcd.objective.ROWS", 3)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(10, 4), torch.randn(20, 4), torch.randn(20)
    ids = torch.randint(0, 18, (10,))
    found, first = head_logprobs(hidden, Head(weight, bias, 3.0, 1.0), ids, 18, 0.5)
    logits = (3 * torch.tanh((hidden @ weight.T + bias) / 3) / 0.5)[:, :18]
    assert torch.allclose(found, logits.log_softmax(1)[torch.arange(10), ids], atol=1e-5)
    assert torch.equal(first, logits.argmax(1) == ids)


def test_a_rule_judges_requests_without_answers(unlabelled: dict, tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text(
        "def f(completion, prompt, teacher_answer):\n"
        "    assert prompt[-1]['role'] == 'user'\n"
        "    return completion == teacher_answer\n"
    )
    scorer = f"python:{tmp_path / 'rule.py'}:f"
    setup = prepare(TrainConfig(**unlabelled | {"scorer": scorer}))
    found = Validation(build_distiller(setup), setup).measure()
    assert found["accuracy"] == found["greedy_agreement"]
    assert found["prompted"]["accuracy"] == 1.0


def test_a_scorer_that_compares_needs_answers(unlabelled: dict) -> None:
    with pytest.raises(ValueError, match=r"scorer number compares with accepted answers, got rows"):
        prepare(TrainConfig(**unlabelled | {"scorer": "number"}))
