"""Tasks of lm-eval on original and distilled model, where the package is."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.elsewhere_tasks import Results, compared, tasks_of
from opcd.evaluation.evaluate import evaluate
from opcd.evaluation.facts import lost_facts
from opcd.evaluation.intervals import mcnemar
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import prepare
from opcd.training.run import train
from tests.conftest import tiny_llama, write_jsonl

TASK = """task: opcd_letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"q": f"{i} is", "choices": ["odd", "even"], "label": 1 - i % 2} for i in range(12)]
    data = write_jsonl(tmp_path / "letters.jsonl", rows)
    file = tmp_path / "letters.yaml"
    file.write_text(TASK.format(file=data), encoding="utf-8")
    return file


def test_without_the_package_a_run_does_not_begin(
    settings: dict, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with a file that is none; before weights are read."""
    monkeypatch.setattr("opcd.training.run.build_distiller", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "lm_eval" else find(name)
    )
    for tasks, message in (
        (str(task), r"needs the package lm-eval, .* pip install 'opcd-kernels\[elsewhere\]'"),
        ("nowhere.yaml", "got 'nowhere.yaml', which is not there"),
        (settings["context"].replace(".md", ".yaml"), "which is not there"),
    ):
        with pytest.raises(InputError, match=message):
            train(TrainConfig(**settings | {"elsewhere_tasks": tasks}))


def test_names_and_files(settings: dict, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    known = SimpleNamespace(all_tasks=["arc_easy", "opcd_letters"])
    monkeypatch.setattr("opcd.evaluation.elsewhere_tasks._manager", lambda *_: known)
    config = TrainConfig(**settings | {"elsewhere_tasks": f"arc_easy, {task}"})
    assert tasks_of(config) == (["arc_easy", "opcd_letters"], [str(task.parent)])
    assert tasks_of(TrainConfig(**settings)) == ([], [])
    monkeypatch.setattr("opcd.training.run.build_distiller", None)
    with pytest.raises(InputError, match="must be tasks of lm-eval, got arc_esay; `lm-eval ls"):
        train(TrainConfig(**settings | {"elsewhere_tasks": "arc_esay"}))


def test_items_are_compared_one_by_one() -> None:
    """Where a metric is the mean of its items, which a perplexity of log-likelihoods is not."""
    logs = [-2.0, -3.0, -1.0, -2.0]
    before = Results(
        {"t": {"acc,none": 0.75, "ppl": 9.0}}, {"t": {"acc,none": [1, 1, 1, 0], "ppl": logs}}
    )
    after = Results(
        {"t": {"acc,none": 0.5, "ppl": 12.0}}, {"t": {"acc,none": [1, 1, 0, 0], "ppl": logs}}
    )
    card = compared({"before": before, "after": after})
    assert card["t"]["ppl"] == {"original": 9.0, "distilled": 12.0}
    assert card["t"]["acc,none"]["difference"]["mean"] == -0.25
    assert card["t"]["acc,none"]["difference"]["p_value"] == mcnemar(0, 1)
    assert lost_facts({"elsewhere_tasks": card})[0] == "t acc,none: 0.750 → 0.500, p 1"


@pytest.mark.slow
def test_a_task_with_local_data(
    settings: dict, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny_llama(seed=4).save_pretrained(tmp_path / "distilled")
    setup = prepare(TrainConfig(**settings | {"elsewhere_tasks": str(task)}))
    for distilled in (settings["model"], str(tmp_path / "distilled")):
        card = evaluate(setup, distilled, Progress()).card["elsewhere_tasks"]
        found = card["opcd_letters"]["acc,none"]
        assert 0 <= found["original"] <= 1
        assert found["difference"]["requests"] == 12
        assert found["difference"]["mean"] == pytest.approx(found["distilled"] - found["original"])
    with pytest.raises(InputError, match="must be tasks of lm-eval, got no_such_task"):
        evaluate(
            prepare(TrainConfig(**settings | {"elsewhere_tasks": "no_such_task"})),
            settings["model"],
            Progress(),
        )
