"""Prompts with tokens left out: the search for a rate, demonstrations and back, and LLMLingua."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.studies.compression import (
    Shown,
    compress_to,
    demonstrations_in,
    lacking,
    llmlingua,
    still_shown,
)
from opcd.studies.rivals import in_front
from opcd.tasks.messages import Message, assistant, system, user
from opcd.tasks.prepare import Setup, prepare
from tests.conftest import tiny_llama, tiny_tokenizer

TURNS = [
    *(user("what is\n\n the weather"), assistant("weather")),
    *(user("play a song"), assistant("music\n\nplease")),
    *(user("how warm is it"), assistant("weather")),
]


def words(messages: Sequence[Message]) -> float:
    return float(sum(len(m["content"].split()) for m in messages))


def test_the_longest_that_some_rate_gives() -> None:
    asked: list[float] = []

    def compress(rate: float) -> list[Message]:
        asked.append(rate)
        return [system("word " * int(100 * rate**2))]  # by another rate than the one asked for

    found = compress_to(30, compress, words)
    assert 25 < found.tokens <= 30
    assert found.tokens == int(100 * found.rate**2)
    assert len(asked) == 6
    short = compress_to(5, lambda rate: [system("word " * (10 + int(100 * rate)))], words)
    assert short.tokens == 11, "the shortest there is"
    with pytest.raises(InputError, match="llmlingua left nothing of it"):
        compress_to(5, lambda rate: [], words)


def test_demonstrations_that_lost_words_are_turns_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = demonstrations_in(TURNS)
    assert shown[0] == Shown("what is the weather", "weather")
    answers = [one.answer for one in shown]
    whole = "\n\n".join(f"{one.request}\n{one.answer}" for one in shown)
    assert still_shown(whole, answers) == shown
    # One without words, one whose answer lost its first line, one whole, one cut behind.
    text = "\nweather\n\na song\nplease\n\nwarm it\nweather\nplay\nmusic\n\nplease\n\nhow\nwea"
    assert still_shown(text, answers) == [
        Shown("warm it", "weather"),
        Shown("play", "music\n\nplease"),
    ]
    monkeypatch.setattr("opcd.studies.compression.is_installed", lambda: True)
    assert lacking([system("Be brief."), *TURNS]) is None
    needs = "a context whose turns are pairs of a user's and an assistant's, got user, user"
    assert needs in str(lacking([user("a"), user("b")]))


@pytest.fixture
def prompted(settings: dict) -> Setup:
    settings["leak_tokens"] = 0
    return prepare(TrainConfig(**settings))


def test_what_llmlingua_is_given_and_gives(
    prompted: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests may lose tokens, answers not; instructions stay, unless they are all there is."""
    given: list[Any] = []

    class Ranker:
        def __init__(self, *_: object) -> None: ...

        def compress_prompt(self, texts: list[str], **options: Any) -> dict[str, Any]:
            given.append((texts, options))
            if options["rate"] > 0.9:
                raise IndexError("of theirs")
            return {"compressed_prompt": "\n\n".join(texts[:2])}

    monkeypatch.setitem(sys.modules, "opcd.studies.ranker", SimpleNamespace(Ranker=Ranker))
    compress = llmlingua(prompted, [system("Sort."), *TURNS])
    assert compress(0.25) == [
        *(system("Sort."), user("what is the weather"), assistant("weather")),
        *TURNS[2:4],
    ]
    texts, options = given[0]
    assert texts[2] == "how warm is it\nweather"
    assert options["context_segs"][2] == ["how warm is it", "\nweather"]
    assert options["context_segs_rate"] == [[0.25, 1.0]] * 3
    assert options["context_segs_compress"] == [[True, False]] * 3
    assert options["iterative_size"] == sum(map(len, texts)) // 2  # bytes are tokens here
    alone = llmlingua(prompted, [system("Answer with one letter.")])
    assert alone(0.5) == [system("Answer with one letter.")]
    assert given[1][1]["context_segs_compress"] == [[True]]
    with pytest.raises(InputError, match=r"got IndexError \(of theirs\) at a rate of 0.95; leave"):
        alone(0.95)


def test_tokens_in_front_are_those_that_requests_carry(prompted: Setup) -> None:
    assert in_front([system("Answer with one letter.")], prompted) == (
        prompted.task.prompt_tokens_saved
    )


def test_llmlingua_itself(settings: dict, tmp_path: Path) -> None:
    """Its losses behind keys and values are those of one pass; shorter at lower rates."""
    pytest.importorskip("llmlingua")
    from opcd.studies.ranker import Ranker

    model, tokenizer = tiny_llama(max_position_embeddings=4096), tiny_tokenizer()
    ranker = Ranker(model, tokenizer)
    ids = torch.randint(2, 258, (1, 700), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    whole, _ = ranker.get_ppl("", "token", ids, mask, return_kv=True)
    _, kept = ranker.get_ppl("", "token", ids[:, :300], mask[:, :300], return_kv=True)
    rest, _ = ranker.get_ppl("", "token", ids, mask, past_key_values=kept, return_kv=True)
    torch.testing.assert_close(whole[300:], rest, rtol=1e-4, atol=1e-4)

    model.save_pretrained(tmp_path / "longer")
    tokenizer.save_pretrained(tmp_path / "longer")
    setup = prepare(TrainConfig(**settings | {"model": str(tmp_path / "longer")}))
    shown = [t for i in range(40) for t in (user(f"request number {i} of many"), assistant("so"))]
    compress = llmlingua(setup, [system("Sort."), *shown])
    lengths = [in_front(compress(rate), setup) for rate in (0.9, 0.3)]
    assert lengths[1] < lengths[0] / 2 < in_front([system("Sort."), *shown], setup) / 2
