"""The scorecard's numbers."""

import json
from pathlib import Path

import pytest
import torch

from opcd.config import TrainConfig
from opcd.evaluation.report import before_after, read_metrics, scorecard_facts, scorecard_table
from opcd.evaluation.scorecard import evaluate, internalised, wilson_interval
from opcd.models.by_name import load_model
from opcd.models.lm import eos_token_ids
from opcd.teacher import SharedPrefixTeacher
from opcd.training.run import prepare


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
def scored(settings: dict) -> tuple[dict, list]:
    """A model that always says "a" and stops, against one that never stops."""
    config = TrainConfig(**settings)
    setup = prepare(config)
    base = load_model(config.model, torch.float32)
    distilled = load_model(config.model, torch.float32)
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
    teacher = SharedPrefixTeacher(base, setup.task.prefixes)
    return evaluate(base, distilled, teacher, setup.task, setup.chat, config)


def test_scorecard(scored: tuple[dict, list]) -> None:
    card, answers = scored
    assert json.loads(json.dumps(card)) == card
    assert card["distilled"]["accuracy"] == 0.25  # "ant" of cat, dog, owl, ant
    assert card["distilled"]["accuracy_interval_95"] == pytest.approx([0.0456, 0.6994], abs=1e-4)
    assert card["distilled"]["n"] == 4
    assert card["distilled"]["mean_completion_tokens"] == 2
    assert card["distilled"]["truncated_share"] == 0
    assert card["base"]["truncated_share"] > 0
    assert card["internalised"] is None  # the random model gains nothing from its prompt
    assert card["divergence"]["before"] > 0
    assert card["divergence"]["after"] > 0
    system = "<|im_start|>system\nAnswer with one letter.<|im_end|>\n"
    assert card["prompt_tokens_saved"] == len(system) - len("<|im_start|><|im_end|>") + 2
    assert [row["distilled_right"] for row in answers] == [False, False, False, True]
    assert answers[0]["distilled"] == "a"
    assert answers[0]["accepted"] == ["c"]


def test_what_people_read(scored: tuple[dict, list]) -> None:
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
