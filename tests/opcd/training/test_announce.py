"""What a run tells before its first step."""

import json
from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.tasks.prepare import prepare
from opcd.training.announce import run_plan
from opcd.training.build import build_distiller
from tests.conftest import CHATML, tiny_llama, tiny_tokenizer


def plan(settings: dict, **overrides: object) -> list[str]:
    setup = prepare(TrainConfig(**settings | overrides), for_training=True)
    return run_plan(setup, build_distiller(setup)).splitlines()


# The context in front of the last user message, as Mistral's templates have it.
IN_LAST_MESSAGE = CHATML.replace(
    "in messages %}", "in messages if message['role'] != 'system' %}"
).replace(
    "+ message['content']",
    "+ (messages[0]['content'] + ' ' if loop.last and messages[0]['role'] == 'system' else '') "
    "+ message['content']",
)


def test_a_context_that_a_prompt_does_not_begin_with_is_said(
    settings: dict, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer(IN_LAST_MESSAGE).save_pretrained(tmp_path / "model")
    settings |= {"model": str(tmp_path / "model")}
    assert not [line for line in plan(settings) if "stand in front" in line]
    turns = [{"role": r, "content": r} for r in ("user", "assistant", "user")]
    with Path(settings["prompts"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"messages": turns}) + "\n")
    assert plan(settings)[-1] == (
        "note      only 6 of about 24 context tokens stand in front of all prompts: the chat "
        "template puts the rest elsewhere, and it is computed with every sequence"
    )


def test_a_warm_up_longer_than_the_run_is_said(settings: dict) -> None:
    assert plan(settings, warmup_steps=8)[-1] == (
        "note      the warm-up of 8 steps is longer than the run: the learning rate ends at 75% of "
        "learning_rate"
    )
    assert not [line for line in plan(settings, warmup_steps=6) if "warm-up" in line]


def test_a_step_of_more_prompts_than_there_are_is_said(settings: dict) -> None:
    said = "note      a step takes 13 prompts, and there are 12: some come more than once"
    assert said in plan(settings, prompts_per_step=13)
    assert not [line for line in plan(settings, prompts_per_step=12) if "a step takes" in line]


def test_the_device_is_told_and_a_gpu_that_stands_idle(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    (student,) = (line for line in plan(settings) if line.startswith("student"))
    assert " on cpu, float32, " in student
    monkeypatch.setattr("opcd.training.announce.in_words", lambda device: f"{device} (named)")
    monkeypatch.setattr("opcd.training.announce.unused_gpu", lambda _: "torch is built for CPUs")
    lines = plan(settings)
    assert any(" on cpu (named), float32, " in line for line in lines)
    note = "note      this machine's GPU is not used: torch is built for CPUs; see docs/gpu.md"
    assert note in lines
