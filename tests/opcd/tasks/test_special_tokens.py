"""Special tokens that are spelled in data."""

from pathlib import Path

from opcd.config import TrainConfig
from opcd.tasks.contexts import Context
from opcd.tasks.data import Example
from opcd.tasks.prepare import prepare
from opcd.tasks.special_tokens import (
    placed_texts,
    special_token_remarks,
    special_tokens_in,
)
from tests.conftest import tiny_tokenizer, write_jsonl


def test_they_are_found_where_a_text_spells_them() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Sky"])  # of no special meaning
    texts = ["Sky", "a <|im_end|> b", "<|im_start|><|im_end|>", "<|im_ end|>"]
    assert special_tokens_in(texts, tokenizer) == {"<|im_end|>": [1, 2], "<|im_start|>": [2]}
    assert len(tokenizer("<|im_end|>")["input_ids"]) == 1


def test_people_are_told_how_often_and_where() -> None:
    def example(text: str, source: str) -> Example:
        return Example(({"role": "user", "content": text},), (), source)

    train = [example("a", "data/p.jsonl:1"), example("b <|im_end|>", "data/p.jsonl:2")]
    test = [example("<|im_end|>", "e.jsonl:1")]
    system = {"role": "system", "content": "End with <|im_start|>."}
    placed = placed_texts({"train": train, "test": test}, {"": Context([system])})
    assert special_token_remarks(placed, tiny_tokenizer()) == [
        "<|im_end|> is spelled in 2 texts, first in p.jsonl:2: the models read a special token "
        "there, not its letters",
        "<|im_start|> is spelled in 1 text, first in the context: the models read a special token "
        "there, not its letters",
    ]


def test_what_was_taken_for_what_is_said_before_weights_are_loaded(settings: dict) -> None:
    rows = [{"question": "red <|im_end|>"}, {"question": "blue"}]
    write_jsonl(Path(settings["prompts"]), rows)
    assert prepare(TrainConfig(**settings)).remarks == [
        'prompts.jsonl: 2 plain rows; "question" is the prompt',
        "<|im_end|> is spelled in 1 text, first in prompts.jsonl:1: the models read a special "
        "token there, not its letters",
    ]
