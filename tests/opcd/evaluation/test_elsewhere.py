"""Original and distilled model on requests that have nothing to do with the context."""

import json
import random
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.config import TrainConfig
from opcd.evaluation.contenders import Models
from opcd.evaluation.elsewhere import (
    Elsewhere,
    card_of,
    common_tokens,
    held_against,
    original_side,
)
from opcd.evaluation.evaluate import evaluate, write_evaluation
from opcd.evaluation.intervals import PerRequest, wilson_interval
from opcd.evaluation.report import elsewhere_table, scorecard_facts
from opcd.models.by_name import load_model
from opcd.runtime.progress import Progress
from opcd.tasks.chat import Chat
from opcd.tasks.elsewhere import ANSWER_TOKENS
from opcd.tasks.prepare import Setup, prepare
from opcd.training.evaluate import evaluate_run
from opcd.training.run import train
from tests.conftest import tiny_llama, tiny_tokenizer, write_jsonl

ENDS = list(range(1, 24))  # so that answers have several lengths


class Heard(Progress):
    """What a run tells."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said += text.splitlines()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.said.append(f"{what} {total}")

    def part(self, note: str, metrics: dict[str, Any] | None = None) -> None:
        self.said.append(note)


@pytest.fixture
def changed(tmp_path: Path) -> str:
    """The folder of a model whose weights moved a little."""
    model = tiny_llama(0, eos_token_id=ENDS)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "changed")
    return str(tmp_path / "changed")


@pytest.fixture
def setup(settings: dict, tmp_path: Path) -> Setup:
    """Of a run with 30 of the package's requests."""
    tiny_llama(0, eos_token_id=ENDS).save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    settings |= {"model": str(tmp_path / "original"), "elsewhere_prompts": 30}
    return prepare(TrainConfig(**settings))


def measured(setup: Setup, distilled: str) -> Elsewhere:
    models = Models(setup)
    original = original_side(models.get(setup.config.model))
    found = held_against(original, models.get(distilled))
    models.close()
    return found


def test_an_unchanged_model_is_the_original(setup: Setup, tmp_path: Path) -> None:
    shutil.copytree(setup.config.model, tmp_path / "copy")
    card, answers = measured(setup, str(tmp_path / "copy"))
    for name, value in (("agreement", 1), ("common_prefix", 1), ("reverse_kl", 0)):
        assert card[name]["mean"] == pytest.approx(value, abs=1e-6)
    assert card["reverse_kl"]["interval_95"] == pytest.approx([0, 0], abs=1e-6)
    n = len(answers)
    for name in ("agreement", "common_prefix"):
        assert card[name]["interval_95"] == pytest.approx(wilson_interval(n, n))
    assert card["forward_kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert all(row["same"] for row in answers)


def greedy(model: Any, ids: list[int]) -> list[int]:
    """Token by token, from all logits."""
    answer: list[int] = []
    while len(answer) < ANSWER_TOKENS and (not answer or answer[-1] not in ENDS):
        answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return answer


@torch.no_grad()
def test_figures_are_those_of_full_logits(setup: Setup, changed: str) -> None:
    card, answers = measured(setup, changed)
    original, distilled = (load_model(x, torch.float32) for x in (setup.config.model, changed))
    same, common, tokens = [], [], 0
    reverse = forward = 0.0
    for request, row in zip(setup.elsewhere, answers, strict=True):
        ids = request.token_ids
        theirs, ours = greedy(original, ids), greedy(distilled, ids)
        same.append(theirs == ours)
        first = [t for t, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b]
        common.append((first[0] if first else min(len(theirs), len(ours))) / len(theirs))
        p, q = (
            model(torch.tensor([ids + theirs])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            for model in (distilled, original)
        )
        nats = [(p.exp() * (p - q)).sum().item(), (q.exp() * (q - p)).sum().item()]
        reverse, forward, tokens = reverse + nats[0], forward + nats[1], tokens + len(theirs)
        assert row["prompt"] == list(request.example.messages)
        assert row["same"] == same[-1]
        assert row["original"] == setup.chat.decode(theirs)
        assert row["distilled"] == setup.chat.decode(ours)
        assert [row["reverse_kl"], row["forward_kl"]] == pytest.approx(
            [x / len(theirs) for x in nats], rel=1e-3
        )
    assert 0 < sum(same) < len(same), "else agreement tells nothing"
    assert card["agreement"]["mean"] == sum(same) / len(same)
    assert card["common_prefix"]["mean"] == pytest.approx(sum(common) / len(common))
    assert card["reverse_kl"]["mean"] == pytest.approx(reverse / tokens, rel=1e-4)
    assert card["forward_kl"]["mean"] == pytest.approx(forward / tokens, rel=1e-4)
    for name in ("agreement", "common_prefix", "reverse_kl", "forward_kl"):
        low, high = card[name]["interval_95"]
        assert low < card[name]["mean"] < high
        by_kind = card["by_kind"].values()
        assert min(k[name] for k in by_kind) < card[name]["mean"] < max(k[name] for k in by_kind)
    assert {kind["prompts"] for kind in by_kind} == {2}
    assert json.loads(json.dumps(card)) == card


def test_answers_agree_by_their_tokens_and_not_by_their_text(
    setup: Setup, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measured(setup, changed).card["agreement"]
    monkeypatch.setattr(Chat, "decode", lambda *_: "the same to a reader")
    found = measured(setup, changed)
    assert found.card["agreement"] == expected
    assert expected["mean"] < 1


def test_what_two_answers_begin_with_alike() -> None:
    assert common_tokens([5, 6, 7, 1], [5, 6, 7, 1]) == 4
    assert common_tokens([5, 6, 7, 1], [5, 9, 7, 1]) == 1
    assert common_tokens([5, 6, 7, 1], [5, 6]) == 2
    assert common_tokens([5, 1], [5, 6, 7]) == 1
    assert common_tokens([5, 1], [6]) == 0


def test_intervals_cover_what_is_true(setup: Setup) -> None:
    """180 requests at a time: long answers, of which 2 in 10 stay, and short ones, 9 in 10.

    Long ones differ by 0.5 nats a token in the mean, short ones by 0.1, so that a mean over
    requests is another than that over tokens.
    """
    draw = random.Random(0)
    setup = setup._replace(elsewhere=setup.elsewhere * 6)

    def drawn() -> dict[str, PerRequest]:
        long = [draw.random() < 0.5 for _ in setup.elsewhere]
        same = [float(draw.random() < (0.2 if x else 0.9)) for x in long]
        lengths = [30 if x else 3 for x in long]
        rates = [2 if x else 10 for x in long]
        nats = [
            sum(draw.expovariate(rate) for _ in range(n))
            for rate, n in zip(rates, lengths, strict=True)
        ]
        return {
            "agreement": PerRequest(same, [1] * len(same)),
            "reverse_kl": PerRequest(nats, lengths),
        }

    cards = [card_of(drawn(), setup) for _ in range(30)]
    true = {"agreement": 0.55, "reverse_kl": (15 * 0.5 + 1.5 * 0.1) / 16.5}
    for name, value in true.items():
        intervals = [card[name]["interval_95"] for card in cards]
        covered = sum(low <= value <= high for low, high in intervals)
        assert covered >= 25, name  # 28.5 expected


def test_one_model_is_in_memory_at_a_time(
    setup: Setup, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref] = []
    load = Setup.load

    def watched(self: Setup, name: str) -> object:
        assert not any(ref() is not None for ref in alive), "the model before is still there"
        alive.append(weakref.ref(model := load(self, name)))
        return model

    monkeypatch.setattr(Setup, "load", watched)
    evaluate(setup, changed, Progress())
    assert len(alive) == 3, "and the teacher's again, for what the distilled model said"
    assert not any(ref() is not None for ref in alive)


def test_it_stands_in_scorecard_and_report(setup: Setup, changed: str, tmp_path: Path) -> None:
    heard = Heard()
    found = evaluate(setup, changed, heard)
    assert heard.said[0] == f"evaluate {len(heard.said) - 1}", "every part is said"
    assert [x for x in heard.said if "elsewhere" in x] == ["elsewhere before", "elsewhere after"]
    card = found.card["elsewhere"]
    assert card["prompts"] == len(found.elsewhere) == 30
    assert card["file"] is None
    (fact,) = [line for line in scorecard_facts(found.card) if line.startswith("elsewhere")]
    agreement = card["agreement"]
    low, high = agreement["interval_95"]
    assert fact == (
        f"elsewhere: on 30 unrelated requests {agreement['mean']:.0%} of greedy answers are the "
        f"original model's ({low:.0%} – {high:.0%}), divergence "
        f"{card['reverse_kl']['mean']:.3f} nats a token"
    )
    table = elsewhere_table(card).splitlines()
    assert table[1].split()[:2] == ["all", "(30)"]
    kinds = [float(line.split()[4]) for line in table[2:]]
    assert len(kinds) == 15
    assert kinds == sorted(kinds, reverse=True)
    write_evaluation(tmp_path, found, setup)
    report = (tmp_path / "report.md").read_text("utf-8")
    assert "\n".join(table) in report
    assert "Answers elsewhere: `elsewhere.jsonl`" in report
    rows = (tmp_path / "elsewhere.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(row) for row in rows] == found.elsewhere
    alone = evaluate(setup, None, Progress())
    assert "elsewhere" not in alone.card
    assert alone.elsewhere == []
    setup = setup._replace(elsewhere=[])
    heard = Heard()
    assert "elsewhere" not in evaluate(setup, changed, heard).card
    assert heard.said[0] == f"evaluate {len(heard.said) - 1}"


def test_scorecards_are_compared_where_elsewhere_is_the_same(settings: dict) -> None:
    """By what is in the file; a user's requests need no kinds."""
    folder = Path(settings["output_dir"]).parent
    rows = [{"prompt": "Good day"}, {"prompt": "Two and two?"}]
    file = write_jsonl(folder / "others.jsonl", rows)
    settings |= {"steps": 1, "elsewhere_prompts": 9, "elsewhere_data": str(file)}
    found = train(TrainConfig(**settings)).evaluation
    assert found is not None
    assert found.card["elsewhere"]["prompts"] == 2
    assert found.card["elsewhere"]["by_kind"] == {}
    assert list(found.elsewhere[0])[:3] == ["prompt", "original", "distilled"]
    (fact,) = [line for line in scorecard_facts(found.card) if line.startswith("elsewhere")]
    assert fact.startswith(f"elsewhere: on 2 requests of {file} ")

    moved = file.rename(folder / "moved.jsonl")
    where, again = evaluate_run(TrainConfig(**settings | {"elsewhere_data": str(moved)}))
    assert where == Path(settings["output_dir"])
    assert again.elsewhere == found.elsewhere
    write_jsonl(moved, rows[:1])
    heard = Heard()
    where, _ = evaluate_run(
        TrainConfig(**settings | {"elsewhere_data": str(moved)}), progress=heard
    )
    assert where.name == "eval-test"
    assert "note      not as in training: elsewhere_data" in heard.said

    selection = Path(settings["output_dir"]) / "final" / "selection.json"
    kept = json.loads(selection.read_text())
    del kept["measured_by"]["elsewhere_data"]  # of a version before it
    selection.write_text(json.dumps(kept))
    where, _ = evaluate_run(TrainConfig(**settings | {"elsewhere_data": str(moved)}))
    assert where == Path(settings["output_dir"])
