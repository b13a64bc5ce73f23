"""What else a prompt can become: the losses and the table of rivals, on the tiny model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opcd.cli import main
from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.models.head import head_of
from opcd.objective import head_divergence
from opcd.runtime.files import file_digest, make_folder, read_metrics, write_json
from opcd.runtime.progress import Progress
from opcd.studies.published import top_divergence
from opcd.studies.rivals import rivals
from opcd.studies.soft_prompts import stored, train_soft_prompt
from opcd.tasks.messages import assistant, user
from opcd.tasks.order import step_rows
from opcd.tasks.prepare import prepare
from opcd.training.run import Outcome
from opcd_kernels import reference
from tests.conftest import in_groups, tiny_llama, write_jsonl


def two_heads() -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    student, teacher = head_of(tiny_llama(0)), head_of(tiny_llama(1))
    torch.manual_seed(0)
    return student, teacher, 3 * torch.randn(300, 32), 3 * torch.randn(300, 32)


def test_published_is_the_sum_over_the_likeliest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its formula, from full logits; its gradient by autograd; in more than one chunk."""
    monkeypatch.setattr("opcd.studies.published.TOP", 20)
    student, teacher, hidden, theirs = two_heads()
    hidden.requires_grad_()
    weight = student.weight.detach().clone().requires_grad_()
    weights = torch.rand(300)
    own = student._replace(weight=weight)
    out = top_divergence(hidden, own, theirs, teacher, weights, temperature=0.8)
    out.loss.backward()
    found = [hidden.grad.clone(), weight.grad.clone()]
    hidden.grad = weight.grad = None
    s = (hidden @ weight.T / 0.8).log_softmax(-1)
    t = (theirs @ teacher.weight.T / 0.8).log_softmax(-1).detach()
    terms = torch.zeros_like(s)
    order = s.detach().argsort(-1, descending=True)[:, :20]
    full = s.exp() * (s - t)
    kept = terms.scatter(1, order, 1.0) * full
    torch.testing.assert_close(out.per_token, kept.sum(-1).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.reverse_kl, full.sum(-1).detach(), rtol=1e-4, atol=1e-5)
    (kept.sum(-1) * weights).sum().backward()
    for ours, expected in zip(found, (hidden.grad, weight.grad), strict=True):
        assert (ours - expected).norm() < 1e-4 * expected.norm()
    assert not torch.allclose(out.per_token, out.reverse_kl, rtol=0.05), "else nothing was left out"


def test_over_all_tokens_it_is_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcd.studies.published.TOP", 10_000)
    student, teacher, hidden, theirs = two_heads()
    weights = torch.full((300,), 1 / 300)
    out = top_divergence(hidden, student, theirs, teacher, weights)
    exact = head_divergence(hidden, student, theirs, teacher, weights)
    torch.testing.assert_close(out.loss.detach(), exact.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.student_entropy, exact.student_entropy, rtol=1e-4, atol=1e-5)
    z = reference.logits(hidden, student.weight)
    assert out.student_entropy[0] == pytest.approx(reference.entropy(z)[0].item(), rel=1e-4)


QUICK = {"steps": 2, "validate_every": 2, "guided_share": 0.5, "elsewhere_prompts": 3}


@pytest.fixture(scope="module")
def a_study(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[dict, list[dict]]:
    from tests.conftest import tiny_settings

    settings = tiny_settings(tmp_path_factory.mktemp("study"), model_dir) | QUICK
    context = Path(settings["context"])
    context.write_text(context.read_text() + " " + "Be brief, and polite. " * 3, encoding="utf-8")
    other = context.with_name("other.md")
    other.write_text("Answer with two digits, whatever you are asked by anybody.", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opcd.studies.compression.is_installed", lambda: False)
        patch.setattr("opcd.evaluation.evaluate.write_page", lambda *_: None)
        return settings, rivals(TrainConfig(**settings), other_context=str(other))


def test_every_rival_has_a_row(a_study: tuple[dict, list[dict]]) -> None:
    settings, rows = a_study
    by_name = {row["rival"]: row for row in rows}
    trained = ["opcd", "plain", "published", "off_policy", "sequence_level"]
    assert list(by_name) == [
        *("base", "prompted", *trained, "demonstrations", "soft_20", "soft_100"),
        *("teacher_without", "other_context"),
    ]
    folder = Path(settings["output_dir"]) / "rivals"
    metrics = read_metrics(folder / "opcd" / "metrics.jsonl")
    tokens = sum(4 * m["mean_completion_tokens"] for m in metrics if "loss" in m)
    assert by_name["opcd"]["tokens"] == pytest.approx(tokens)
    stored = ("off_policy", "sequence_level", "soft_20", "soft_100")
    (same,) = {(by_name[name]["steps"], by_name[name]["tokens"]) for name in stored}
    assert same[1] == pytest.approx(tokens, abs=4 * 8 / 2), "half of the longest step"
    made = json.loads((folder / "stored" / "made.json").read_text("utf-8"))
    assert made["seconds"] > 0
    for name in trained:
        steps = [m for m in read_metrics(folder / name / "metrics.jsonl") if "loss" in m]
        alone = sum(m["step_time_s"] for m in steps)
        own = made["seconds"] if name in stored else 0.0
        assert by_name[name]["train_s"] == pytest.approx(alone + own), "with what it learns from"
    assert by_name["soft_20"]["train_s"] > made["seconds"]
    for name in (*trained, "teacher_without", "other_context"):
        assert by_name[name]["train_s"] > 0
        assert by_name[name]["prompt_tokens"] == 0
        assert not (folder / name / "checkpoints").exists()
        assert not (folder / name / "final").exists()
    setup = prepare(TrainConfig(**settings))
    assert by_name["prompted"]["prompt_tokens"] == setup.task.prompt_tokens_saved
    assert [by_name[n]["prompt_tokens"] for n in ("soft_20", "soft_100")] == [20, 100]
    assert 50 < by_name["demonstrations"]["prompt_tokens"] < 400
    assert [by_name[n]["elsewhere"] for n in ("base", "demonstrations", "soft_20")] == [1.0] * 3
    assert by_name["opcd"]["elsewhere"] < 1
    low, high = by_name["opcd"]["elsewhere_interval_95"]
    assert low <= by_name["opcd"]["elsewhere"] <= high
    assert by_name["teacher_without"]["n"] == 4
    other = Path(settings["context"]).with_name("other.md")
    assert by_name["other_context"]["context"] == file_digest(other)
    assert by_name["other_context"]["elsewhere"] is not None


def test_what_is_there_is_not_run_again(
    a_study: tuple[dict, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, rows = a_study
    monkeypatch.setattr("opcd.studies.rivals.train", None)
    monkeypatch.setattr("opcd.studies.rivals.evaluate", None)
    again = rivals(TrainConfig(**settings), ["soft_20", "plain"])
    assert again == [
        r for r in rows if r["rival"] in ("base", "prompted", "opcd", "plain", "soft_20")
    ]
    table = (Path(settings["output_dir"]) / "rivals" / "rivals.md").read_text(encoding="utf-8")
    assert [line.split()[0] for line in table.splitlines()[2:7]] == [r["rival"] for r in again]
    with pytest.raises(
        InputError, match="must hold rivals of these settings, got others of learni"
    ):
        rivals(TrainConfig(**settings | {"learning_rate": 1e-4}))
    for field, named in (("context", "context or chat template"), ("test_data", "test_data")):
        file = Path(settings[field])
        kept = file.read_text(encoding="utf-8")
        changed = kept.replace("c", "k", 1)
        file.write_text(changed if field == "test_data" else kept + " Now.", encoding="utf-8")
        with pytest.raises(InputError, match=f"of these files, got others of .*{named}"):
            rivals(TrainConfig(**settings), ["plain"])
        file.write_text(kept, encoding="utf-8")
    assert rivals(TrainConfig(**settings), ["plain"]) == again[:-1]


def test_a_compressed_prompt_is_a_row_by_its_tokens(
    a_study: tuple[dict, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ranker:
        def __init__(self, *_: object) -> None: ...

        def compress_prompt(self, texts: list[str], *, rate: float, **_: Any) -> dict[str, Any]:
            return {"compressed_prompt": texts[0][: int(rate * len(texts[0]))]}

    monkeypatch.setitem(sys.modules, "opcd.studies.ranker", SimpleNamespace(Ranker=Ranker))
    monkeypatch.setattr("opcd.studies.compression.is_installed", lambda: True)
    monkeypatch.setattr("opcd.evaluation.evaluate.write_page", lambda *_: None)
    settings, rows = a_study
    row = rivals(TrainConfig(**settings), ["llmlingua_2"])[-1]
    whole = next(r["prompt_tokens"] for r in rows if r["rival"] == "prompted")
    assert row["rival"] == "llmlingua_2"
    assert 0.45 * whole < row["prompt_tokens"] <= whole / 2
    assert row["what"] == f"the context, {whole / row['prompt_tokens']:.1f} times shorter"
    assert row["elsewhere"] == 1.0


def test_turns_are_counted_and_what_is_held_out_is_not_replayed(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversations of one to three turns; the test requests are some of them."""
    monkeypatch.setattr("opcd.studies.compression.is_installed", lambda: False)
    monkeypatch.setattr("opcd.evaluation.evaluate.write_page", lambda *_: None)

    def talk(number: int) -> dict[str, Any]:
        said = [user(f"{number} {turn}?") for turn in range(number % 3 + 1)]
        answered = [turn for asked in said for turn in (asked, assistant("So."))]
        return {"messages": answered[:-1]}

    write_jsonl(tmp_path / "prompts.jsonl", [talk(number) for number in range(48)])
    change = {"turns": "all", "validation_data": None, "test_data": None, "steps": 3}
    config = TrainConfig(**settings | change)
    found = rivals(config, ["off_policy", "teacher_without"])
    by_name = {row["rival"]: row for row in found}
    setup, folder = prepare(config, for_training=True), Path(settings["output_dir"]) / "rivals"
    for name in ("opcd", "off_policy"):
        steps = [m for m in read_metrics(folder / name / "metrics.jsonl") if "loss" in m]
        tokens = [
            m["mean_completion_tokens"]
            * sum(map(len, step_rows(setup.task.conversations, i, config)))
            for i, m in enumerate(steps)
        ]
        assert by_name[name]["tokens"] == pytest.approx(sum(tokens))
    assert abs(by_name["off_policy"]["tokens"] - by_name["opcd"]["tokens"]) <= max(tokens) / 2
    replayed = (folder / "teacher_without" / "prompts.jsonl").read_text("utf-8")
    assert len(setup.task.test) == 10
    assert not any(json.dumps(c.example.text) in replayed for c in setup.task.test)
    assert len(replayed.splitlines()) == len(setup.task.training)
    assert by_name["teacher_without"]["tokens"] > 2 * 3 * 4, "as many sequences as turns"


class Heard(Progress):
    """The losses of steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def part(self, note: str, metrics: dict[str, Any] | None = None) -> None:
        self.losses.append(float(note.split()[-1]))


def test_a_soft_prompt_learns_the_teachers_completions(
    a_study: tuple[dict, list[dict]], tmp_path: Path
) -> None:
    """From the context's own first tokens on, whose loss is that of full passes behind them."""
    settings, _ = a_study
    file = Path(settings["output_dir"]) / "rivals" / "off_policy" / "guided.jsonl"
    known = stored(file)
    change = {"guided_share": 1.0, "steps": 30, "warmup_steps": 0, "prompts_per_step": 4}
    setup = prepare(TrainConfig(**settings | change), for_training=True)
    setup.task.training[:] = [c for c in setup.task.training if c.prompt.key in known][:4]
    heard = Heard()
    _, tokens = train_soft_prompt(setup, file, 20, tmp_path / "soft", heard)
    model, nats, count = tiny_llama(), 0.0, 0
    for prompt in setup.task.train:
        (said,) = known[prompt.key]
        ids = [*setup.task.a_prefix[:20], *prompt.student_ids, *said]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, -len(said) - 1 : -1].log_softmax(-1)
        nats -= logprobs.gather(1, torch.tensor(said)[:, None]).sum().item()
        count += len(said)
    assert heard.losses[0] == pytest.approx(nats / count, abs=2e-3)
    assert heard.losses[-1] < 0.8 * heard.losses[0]
    assert tokens == 30 * count
    named = json.loads((tmp_path / "soft" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == settings["model"]


def test_harm_is_of_the_model_of_the_row(settings: dict) -> None:
    """What the prompt spoils for the base, and for the distilled model; from a scorecard."""

    def share(mean: float) -> dict[str, Any]:
        return {"mean": mean, "interval_95": [mean - 0.1, mean + 0.1]}

    column = {"greedy_agreement": share(0.5), "n": 4, "mean_completion_tokens": 2.0}
    harms = {"base": None, "prompted": 0.25, "distilled": None, "distilled_prompted": 0.75}
    columns = {name: column | ({"harm": share(x)} if x else {}) for name, x in harms.items()}
    run = make_folder(Path(settings["output_dir"]) / "rivals" / "opcd")
    write_json(run / "scorecard.json", {"contenders": columns, "prompt_tokens_saved": 33.0})
    write_jsonl(run / "metrics.jsonl", [{"loss": 1.0, "step_time_s": 2.0, "completion_tokens": 9}])
    found = {row["rival"]: row["harm"] for row in rivals(TrainConfig(**settings), ["opcd"])}
    assert found == {"base": 0.25, "prompted": None, "opcd": 0.75}


@pytest.mark.parametrize("name", ["opcd", "other_context"])
def test_a_run_that_was_stopped_is_no_rival(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stopped = Outcome(tmp_path, 1, "SIGINT", None)
    monkeypatch.setattr("opcd.studies.rivals.train", lambda *_: stopped)
    kept = Path(settings["output_dir"]) / "rivals" / "rivals.jsonl"
    (tmp_path / "other.md").write_text("Answer with two digits.", encoding="utf-8")
    if name != "opcd":
        kept.parent.mkdir(parents=True)
        write_jsonl(kept, [{"rival": other} for other in ("base", "prompted", "opcd")])
    with pytest.raises(InputError, match=f"must go to its end, but {name} was stopped by SIGINT"):
        rivals(TrainConfig(**settings), [name], str(tmp_path / "other.md"))


def test_a_row_of_another_other_context_is_not_taken_for_this_ones(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opcd.studies.rivals.train", None)
    first, second = tmp_path / "first.md", tmp_path / "second.md"
    first.write_text("Answer with two digits.", encoding="utf-8")
    second.write_text("Answer with three digits.", encoding="utf-8")
    kept = Path(settings["output_dir"]) / "rivals" / "rivals.jsonl"
    kept.parent.mkdir(parents=True)
    row = {"rival": "other_context", "context": file_digest(first)}
    write_jsonl(kept, [{"rival": name} for name in ("base", "prompted", "opcd")] + [row])
    with pytest.raises(InputError, match=r"another context than .*second\.md"):
        rivals(TrainConfig(**settings), ["other_context"], str(second))


def test_what_rivals_cannot_share_is_refused(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("opcd.studies.rivals.train", None)
    monkeypatch.setattr("opcd.studies.compression.is_installed", lambda: False)
    config = TrainConfig(**settings)
    for arguments, message in (
        ((["of_policy"],), "a rival must be one of opcd, .*, got 'of_policy'; did you mean off_p"),
        ((["other_context"],), "the rival other_context needs another task's context, got none"),
        ((["soft_100"],), r"soft_100 needs a context longer than its 100 vectors, got \d+ tok"),
        (
            (["llmlingua_4"],),
            "llmlingua_4 needs the package llmlingua, which is not insta",
        ),
    ):
        with pytest.raises(InputError, match=message):
            rivals(config, *arguments)
    for other, message in (
        (str(tmp_path / "nowhere.md"), "context must be a file, got .*nowhere.md"),
        (settings["context"], "other_context must be another task's, got the same as context in"),
    ):
        with pytest.raises(InputError, match=message):
            rivals(config, ["other_context"], other)
    for change, message in (
        ({"test_data": None}, "rivals need test data, got none"),
        ({"max_minutes": 10.0}, "compared after as many steps, got max_minutes 10"),
        ({"guided_completions": "x", "guided_share": 0.5}, "completions|guided"),
        ({"prompts": None}, "prompts must be given to train on"),
    ):
        with pytest.raises(InputError, match=message):
            rivals(TrainConfig(**settings | change))
    file = tmp_path / "config.yaml"
    file.write_text(in_groups(settings), encoding="utf-8")
    assert main(["rivals", "--config", str(file), "--rival", "sft"]) == 2
    assert "a rival must be one of" in capsys.readouterr().err
