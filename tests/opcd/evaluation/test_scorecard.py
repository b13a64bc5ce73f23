"""The scorecard's numbers."""

import json
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from opcd.config import TrainConfig
from opcd.evaluation.contenders import Answer, Contender, greedy_answers
from opcd.evaluation.report import before_after, read_metrics, scorecard_facts, scorecard_table
from opcd.evaluation.score import Scored, score
from opcd.evaluation.scorecard import internalised, scorecard, wilson_interval
from opcd.models.by_name import load_model
from opcd.models.lm import eos_token_ids
from opcd.rollouts.protocol import Rollout, SamplingParams
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup, prepare
from opcd.tasks.task import Case


def test_wilson_interval() -> None:
    """Newcombe (1998), table I: 81 of 263 and 0 of 20."""
    assert wilson_interval(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx([0.0, 0.1611], abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0


def test_internalised() -> None:
    assert internalised(0.2, 0.8, 0.65) == pytest.approx(0.75)
    assert internalised(0.5, 0.5, 0.9) is None
    assert internalised(0.6, 0.5, 0.9) is None


@pytest.fixture
def scored(settings: dict, tmp_path: Path) -> Scored:
    """A model that always says "a" and stops, against one that never stops."""
    setup = prepare(TrainConfig(**settings))
    distilled = load_model(setup.config.model, torch.float32)
    letter = setup.tokenizer("a")["input_ids"][0]
    with torch.no_grad():
        for layer in distilled.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # Without layers the next token depends on the last one alone: newline -> a -> EOS.
        embed = distilled.model.embed_tokens.weight
        newline = setup.tokenizer("\n")["input_ids"][0]
        distilled.lm_head.weight.zero_()
        distilled.lm_head.weight[letter] = embed[newline] * 10
        distilled.lm_head.weight[eos_token_ids(distilled)[0]] = embed[letter] * 10
    distilled.save_pretrained(tmp_path / "distilled")
    return score(setup, str(tmp_path / "distilled"), Progress())


def test_scorecard(scored: Scored) -> None:
    card, answers = scored
    assert json.loads(json.dumps(card)) == card
    names = ["base", "prompted", "distilled", "distilled_prompted"]
    assert list(card["contenders"]) == names, "in the order in which people read them"
    distilled = card["contenders"]["distilled"]
    assert distilled["meaning"] == "after, without the context"
    assert distilled["accuracy"] == 0.25  # "ant" of cat, dog, owl, ant
    assert distilled["accuracy_interval_95"] == pytest.approx([0.0456, 0.6994], abs=1e-4)
    assert distilled["n"] == 4
    assert distilled["mean_completion_tokens"] == 2
    assert distilled["truncated_share"] == 0
    assert card["contenders"]["base"]["truncated_share"] > 0
    assert card["internalised"] is None  # the random model gains nothing from its prompt
    assert card["divergence"]["before"] > 0
    assert card["divergence"]["after"] > 0
    system = "<|im_start|>system\nAnswer with one letter.<|im_end|>\n"
    assert card["prompt_tokens_saved"] == len(system) - len("<|im_start|><|im_end|>") + 2
    assert [row["distilled_right"] for row in answers] == [False, False, False, True]
    assert answers[0]["distilled"] == "a"
    assert answers[0]["accepted"] == ["c"]


def test_anything_that_answers_is_a_contender(settings: dict) -> None:
    """Two that know no model: one is always right, one hears the prompt's first letter as z."""
    task = prepare(TrainConfig(**settings)).task

    def right(cases: Sequence[Case]) -> list[Answer]:
        return [Answer(case.example.answers[0], 1, "stop") for case in cases]

    def wrong(cases: Sequence[Case]) -> list[Answer]:
        return [Answer("z", 7, "length") for _ in cases]

    contenders = [Contender("oracle", "knows", right), Contender("deaf", "guesses", wrong)]
    answers = {c.name: c.answer(task.test) for c in contenders}
    columns, rows = scorecard(contenders, answers, task.test, task.scorer)
    assert columns["oracle"]["accuracy"] == 1
    assert columns["deaf"]["accuracy"] == 0
    assert columns["deaf"]["mean_completion_tokens"] == 7
    assert columns["deaf"]["truncated_share"] == 1
    assert rows[1]["oracle"] == "d"
    assert rows[1]["deaf_right"] is False


def test_one_model_is_in_memory_at_a_time(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = prepare(TrainConfig(**settings))
    alive: list[weakref.ref] = []
    load = Setup.load

    def watched(self: Setup, name: str, *dtype: torch.dtype) -> object:
        assert not any(ref() is not None for ref in alive), "the model before is still there"
        model = load(self, name, *dtype)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Setup, "load", watched)
    copy = Path(settings["output_dir"]).parent / "copy"
    shutil.copytree(settings["model"], copy)
    score(setup, str(copy), Progress())
    assert len(alive) == 2
    assert not any(ref() is not None for ref in alive)


def test_equal_prompts_are_answered_once(settings: dict) -> None:
    setup = prepare(TrainConfig(**settings))
    asked: list[int] = []

    class Echo:
        def generate(self, prompts: Sequence, params: SamplingParams) -> list[Rollout]:
            asked.append(len(prompts))
            return [Rollout(p, [p[-1] + 2], "stop", 0) for p in prompts]

    answers = greedy_answers(Echo(), [[40], [50], [40]], setup)
    assert asked == [2]
    assert [a.text for a in answers] == [setup.chat.decode([x]) for x in (42, 52, 42)]


def test_what_people_read(scored: Scored) -> None:
    card, answers = scored
    table = scorecard_table(card)
    assert "25.0%" in table
    assert "4.6% – 69.9%" in table
    facts = " ".join(scorecard_facts(card))
    assert "nothing to take over" in facts
    assert f"prompt tokens saved a request: {card['prompt_tokens_saved']:.0f}" in facts
    shown = before_after(answers)
    assert shown.count("distilled") == 4
    assert "✓ distilled  a" in shown


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert read_metrics(tmp_path / "m.jsonl", last_step=2) == [{"step": 1}, {"step": 2}]
