"""`opcd check` on the tiny model."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from opcd.cli import main
from opcd.config import TrainConfig
from opcd.preflight.check import check
from opcd.preflight.rendering import rendering, rendering_lines
from opcd.tasks.prepare import prepare
from tests.conftest import in_groups, tiny_llama, tiny_tokenizer


def test_the_command(settings: dict, capsys: pytest.CaptureFixture) -> None:
    config = Path(settings["output_dir"]).parent / "config.yaml"
    config.write_text(in_groups(settings))
    status = main(["check", "--config", str(config)])
    printed = capsys.readouterr().out
    for name in ("teacher", "student", "saved", "rendering", "prompt", "gap", "verdict"):
        assert f"\n{name} " in f"\n{printed}"
    found = json.loads((Path(settings["output_dir"]) / "check.json").read_text())
    assert status == (0 if found["verdict"]["word"] == "go" else 1)
    assert found["verdict"]["reason"] in printed
    assert found["wrong_inputs"] == ""
    assert found["requests"] == 3
    assert main(["check", "--config", str(config), "--json"]) == status
    again = json.loads(capsys.readouterr().out)
    moving = {"room_bytes": 0, "pays_after": 0.0}  # what a machine has, and how fast it is
    assert again | moving == found | moving


def test_a_model_that_hears_nothing_needs_no_prompt(settings: dict, tmp_path: Path) -> None:
    """Without layers the next token depends on the last one alone: no context reaches it."""
    deaf = tiny_llama()
    for layer in deaf.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    deaf.save_pretrained(tmp_path / "deaf")
    tiny_tokenizer().save_pretrained(tmp_path / "deaf")
    settings |= {"model": str(tmp_path / "deaf"), "validation_data": None}
    found = check(prepare(TrainConfig(**settings)), lambda: 60.0)
    assert found.found.changed == 0
    assert abs(found.found.gap) < 1e-5
    # Of 12 requests without answers: cut at the limit, as a random model's are.
    assert found.verdict.word in ("the prompt does not work", "the prompt changes nothing")


def test_prompts_that_are_not_the_tokenizers_own_are_named(settings: dict) -> None:
    setup = prepare(TrainConfig(**settings))
    assert not rendering(setup, setup.task.test).differing
    case = setup.task.test[1]
    case.prompt.teacher_ids.append(3)
    found = rendering(setup, setup.task.test)
    assert found.differing == [f"{case.source}: the teacher's prompt"]
    assert "not what the tokenizer's own apply_chat_template writes" in rendering_lines(found)[-1]
    checked = check(setup, lambda: 60.0)
    assert checked.verdict.word != "wrong inputs", "the sample is the validation data"


def test_prompts_are_rendered_by_a_tokenizer_of_its_own(settings: dict) -> None:
    setup = prepare(TrainConfig(**settings))
    plain = AutoTokenizer.from_pretrained(settings["model"])
    setup.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    found = rendering(setup, setup.task.test)
    assert found.compared == len(setup.task.test)
    assert not found.differing
    assert plain.decode(setup.task.prompted_ids(setup.task.test[0].prompt)) == found.teacher
