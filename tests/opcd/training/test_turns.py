"""Training turn by turn: whole conversations in a step, their histories computed once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.config import TrainConfig
from opcd.preflight.memory import Models
from opcd.rollouts.noise import streams
from opcd.rollouts.protocol import SamplingParams
from opcd.tasks.prepare import Setup, prepare
from opcd.training.announce import run_plan
from opcd.training.build import build_distiller
from opcd.training.sources import parted
from tests.conftest import tiny_llama, tiny_tokenizer, write_jsonl

WORDS = ["red", "blue", "pink", "teal", "gold", "grey", "lime", "navy"]
WORDS += ["plum", "rust", "sand", "snow", "mint", "wine", "rose", "jade"]


def row(word: str, turns: int) -> dict:
    """The user's and the assistant's turns of one length each, the user's last."""
    said = [
        f"{word:>4} {turn}: what is meant by that, and what by {word:>4}?" for turn in range(turns)
    ]
    answers = [f"By {word:>4} a colour is meant, {turn} times." for turn in range(turns - 1)]
    messages = [{"role": "user", "content": said[0]}]
    for answer, asked in zip(answers, said[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": asked}]
    return {"messages": messages}


@pytest.fixture
def talks(settings: dict, tmp_path: Path) -> dict:
    """16 conversations of 6 turns, and a model that does not end its own."""
    model = tiny_llama(max_position_embeddings=2048)
    with torch.no_grad():
        model.lm_head.weight[1] = 0
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(Path(settings["prompts"]), [row(word, 6) for word in WORDS])
    more = {
        "turns": "all",
        "prompts_per_step": 16,
        "temperature": 1e-4,
        "max_completion_tokens": 16,
    }
    return settings | more | {"model": str(tmp_path / "model")}


def prepared(settings: dict, **overrides: Any) -> Setup:
    return prepare(TrainConfig(**settings | overrides), for_training=True)


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Tokens, pads among them, that went into the model's layers."""
    found: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    yield found
    hook.remove()


def distinct_starts(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens a model must compute to know what follows each start of each sequence."""
    tree: dict = {}
    count = 0
    for ids in sequences:
        node = tree
        for token in ids:
            count += token not in node
            node = node.setdefault(token, {})
    return count


@pytest.mark.parametrize("engine", ["generate", "static"])
def test_a_step_computes_each_history_once(talks: dict, engine: str) -> None:
    d = build_distiller(prepared(talks, rollout_engine=engine))
    with counted(d.student) as found:
        episodes = d.rollout()
    assert len(episodes) == 96
    assert all(episode.scored_tokens == 16 for episode in episodes)
    least = distinct_starts([episode.student_ids[:-1] for episode in episodes])
    assert least <= sum(found) <= 1.05 * least
    assert sum(found) < 0.4 * sum(len(episode.student_ids) - 1 for episode in episodes)


@pytest.mark.parametrize("overrides", [{}, {"completions_per_prompt": 2}])
def test_draws_are_those_of_each_prompt_alone(talks: dict, overrides: dict) -> None:
    """By seed, step, prompt and sample, whatever else is in the step."""
    write_jsonl(Path(talks["prompts"]), [row(word, 1 + i % 4) for i, word in enumerate(WORDS)])
    setup = prepared(talks, temperature=0.9, prompts_per_step=5, **overrides)
    d = build_distiller(setup)
    d.steps_done = 2
    n = setup.config.completions_per_prompt
    prompts = {prompt.key: prompt for prompt in setup.task.train}
    episodes = d.rollout()
    by_start = {tuple(p.student_ids): p for p in prompts.values()}
    for number, episode in enumerate(episodes):
        prompt = by_start[tuple(episode.student_ids[: episode.student_spans[0][0]])]
        stream = streams(setup.config.seed, 2, [prompt], n)[number % n]
        (alone,) = d.engine.generate([prompt.student_ids], SamplingParams(16, 0.9), [stream])
        assert episode.scored_ids == alone.completion_token_ids


def test_a_step_takes_whole_conversations(talks: dict) -> None:
    """So do guided ones; over steps each row comes as often as any other."""
    write_jsonl(Path(talks["prompts"]), [row(word, 1 + i % 4) for i, word in enumerate(WORDS)])
    setup = prepared(talks, prompts_per_step=4, guided_share=0.25, steps=8)
    rows = setup.task.conversations
    apart = [
        case._replace(example=replace(case.example, source=f"p:{i}"))
        for i, case in enumerate(setup.task.training)
    ]
    assert replace(setup.task, training=apart).training_digest != setup.task.training_digest
    assert sorted(map(len, rows)) == sorted([1, 2, 3, 4] * 4)
    seen: list[int] = []
    for step in range(4):
        own, guided = parted(rows, step, setup.config)
        assert (len(own), len(guided)) == (3, 1)
        seen += [rows.index(conversation) for conversation in [*own, *guided]]
    assert sorted(seen) == list(range(16))
    d = build_distiller(setup)
    episodes = d.rollout()
    own, guided = parted(rows, 0, setup.config)
    assert sum(e.origin == "student" for e in episodes) == sum(map(len, own))
    assert sum(e.origin == "guided" for e in episodes) == sum(map(len, guided))
    assert "data      40 training of 16 conversations" in run_plan(setup, d)
    said = "a step takes 20 conversations, and there are 16: some come more than once"
    assert said in run_plan(prepared(talks, prompts_per_step=20), d)
    few, many = (Models(prepared(talks, prompts_per_step=k)).memory() for k in (1, 8))
    assert many.parts["rollouts"] > 2 * few.parts["rollouts"]


def test_rows_of_one_prompt_are_taken_as_before(settings: dict) -> None:
    last, every = (prepared(settings, turns=turns) for turns in ("last", "all"))
    assert last.fingerprint == every.fingerprint
    assert last.task.conversations == every.task.conversations == [[p] for p in last.task.train]
