"""Runs that go wrong for a reason, each of which raises its alarm; see also test_alarms.py.

Teachers are tiny models whose answers are known to be one letter, or nothing, by their weights.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_letters

import pytest
import torch
from transformers import LlamaForCausalLM

from opcd.cli import main
from opcd.runtime.files import read_metrics
from tests.conftest import in_groups, tiny_llama, tiny_tokenizer, write_jsonl

WORDS = ("apple", "pear", "fig", "date", "kiwi", "peach", "melon", "nut")
TOKENIZER = tiny_tokenizer()
END, NEWLINE = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "Ċ"])
LETTERS = TOKENIZER.convert_tokens_to_ids([*ascii_letters])


def leaning(to: Sequence[int], end_first: float = -100.0, seed: int = 0) -> LlamaForCausalLM:
    """A random model that says one of the tokens `to` and ends.

    Two dimensions of its hidden states are constant, but that the second is 0 behind a newline,
    where an answer begins: END is as likely there as `end_first` makes it, and sure behind a token.
    """
    model = tiny_llama(seed, initializer_range=0.4)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :2] = 4.0
        model.model.embed_tokens.weight[NEWLINE, 1] = 0.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:2] = 0.0
            layer.mlp.down_proj.weight[:2] = 0.0
        head = model.lm_head.weight
        head *= 3.0  # and so sure of what it says
        head[:, 0] = -100.0
        head[to, 0] = 0.0
        head[END, 0] = end_first
        head[:, 1] = 0.0
        head[END, 1] = 200.0
    return model


@torch.no_grad()
def first_tokens(model: LlamaForCausalLM, words: Iterable[str], context: str) -> list[torch.Tensor]:
    """Logits of an answer's first token, behind the context."""
    found = []
    for word in words:
        messages = [{"role": "system", "content": context}, {"role": "user", "content": word}]
        ids = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        found.append(model(torch.tensor([ids])).logits[0, -1])
    return found


def alarms(settings: dict, teacher: LlamaForCausalLM | None = None, **more: object) -> dict:
    """Trains; the alarms of the run, by name, with the step that each was raised after."""
    folder = Path(settings["output_dir"]).parent
    settings |= {"validate_every": 10, "save_every": 100, "test_data": None, **more}
    if teacher is not None:
        teacher.save_pretrained(folder / "teacher")
        TOKENIZER.save_pretrained(folder / "teacher")
        settings["teacher"] = str(folder / "teacher")
    (folder / "config.yaml").write_text(in_groups(settings))
    assert main(["train", "--config", str(folder / "config.yaml")]) == 0
    rows = [row for row in read_metrics(folder / "run" / "metrics.jsonl") if "alarms" in row]
    return {name: (row["step"], said) for row in rows for name, said in row["alarms"].items()}


@pytest.fixture
def labelled(settings: dict) -> tuple[dict, LlamaForCausalLM]:
    """Validation requests whose answers are what the teacher says to them: one letter."""
    teacher = leaning(LETTERS, seed=1)
    context = Path(settings["context"]).read_text("utf-8")
    rows = [
        {"prompt": word, "answer": TOKENIZER.decode([int(logits.argmax())])}
        for word, logits in zip(WORDS, first_tokens(teacher, WORDS, context), strict=True)
    ]
    assert len({row["answer"] for row in rows}) > 1
    write_jsonl(Path(settings["validation_data"]), rows)
    return settings, teacher


def test_a_rate_that_is_far_too_low(labelled: tuple[dict, LlamaForCausalLM]) -> None:
    """The loss falls a little; nothing is learned, and answers do not end."""
    settings, teacher = labelled
    found = alarms(settings, teacher, steps=30, learning_rate=6e-4)
    assert found.keys() == {"length", "coverage"}
    assert found["length"][0] == 20
    assert (
        "cut at 8 tokens in the last 10 steps, 100% in those before, prompted 0%"
        in (found["length"][1])
    )
    step, said = found["coverage"]
    assert step == 30
    assert "accuracy 0.0% by step 0 and not above by step 30, prompted 100.0%" in said


def test_a_collapse(labelled: tuple[dict, LlamaForCausalLM]) -> None:
    """At a rate that is far too high a student is sure of one token, whatever it is asked."""
    settings, _ = labelled
    write_jsonl(Path(settings["validation_data"]), [{"prompt": word} for word in WORDS])
    found = alarms(settings, steps=20, learning_rate=1.0)
    assert found.keys() >= {"prompt", "entropy", "constant"}
    assert "most answers of the prompted teacher are cut (100% at 8 tokens)" in found["prompt"][1]
    assert (found["entropy"][0], found["constant"][0]) == (20, 20)
    assert "entropy 0.000 nats a token on its own completions" in found["entropy"][1]
    assert "100% the same after step 20" in found["constant"][1]


def test_silence_that_is_learned(settings: dict) -> None:
    """Trained on requests to which the prompted teacher says nothing, it says nothing to others."""
    context = Path(settings["context"]).read_text("utf-8")
    words = [first + second for first in WORDS for second in WORDS]
    teacher = leaning(LETTERS, end_first=37.0, seed=5)
    answers = first_tokens(teacher, words, context)
    by_margin = sorted(
        (float(logits[LETTERS].max() - logits[END]), word)
        for word, logits in zip(words, answers, strict=True)
    )
    silent, spoken = by_margin[:16], by_margin[-16:]
    assert silent[-1][0] < -0.5 < 0.5 < spoken[0][0]
    for name, part in (("prompts", silent), ("validation_data", spoken)):
        write_jsonl(Path(settings[name]), [{"prompt": word} for _, word in part])
    step, said = alarms(settings, teacher, steps=20, learning_rate=1e-2)["empty"]
    assert step <= 20
    assert "prompted 0%" in said


@pytest.mark.parametrize(
    ("end_first", "reason"),
    [
        (200.0, "most answers of the prompted teacher are empty (100%)"),
        (-100.0, "the context does not make the teacher's answers better"),
    ],
    ids=["empty", "other letters"],
)
def test_a_prompt_that_is_nothing_good(
    end_first: float, reason: str, labelled: tuple[dict, LlamaForCausalLM]
) -> None:
    settings, _ = labelled
    step, said = alarms(settings, leaning(LETTERS, end_first, seed=2), steps=1)["prompt"]
    assert step == 0
    assert reason in said
