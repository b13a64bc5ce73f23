"""How answers are drawn, ended and written down."""

from pathlib import Path
from typing import Any

import pytest

from opcd.config import TrainConfig
from opcd.config.settings import gather
from opcd.errors import InputError
from opcd.evaluation.contenders import Models, answers_alone
from opcd.evaluation.decoding import answer_params, greedy_params, rollout_params
from opcd.evaluation.evaluate import evaluate
from opcd.evaluation.measured import measured_by
from opcd.evaluation.report import scorecard_facts
from opcd.preflight import memory
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup, prepare
from opcd.training.build import build_distiller
from opcd.training.run import train
from tests.conftest import tiny_llama, tiny_tokenizer

DRAWN = {"eval_temperature": 0.9, "top_k": 20, "top_p": 0.95}


def prepared(settings: dict, **overrides: Any) -> Setup:
    return prepare(TrainConfig(**settings | overrides), for_training=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop": [" \n"]}, r"stop must hold texts that are not blank, got ' \\n', at which"),
        ({"stop": ["###", ""]}, "stop must hold texts that are not blank, got ''"),
        ({"stop": "###"}, "stop must be a list of texts, got '###'"),
        ({"stop": [3]}, r"stop must be a list of texts, got \[3\]"),
        ({"top_k": 20}, "must come with an eval_temperature above 0, got top_k 20 and top_p 1"),
        ({"top_p": 0.9}, "must come with an eval_temperature above 0, got top_k 0 and top_p 0.9"),
        (DRAWN | {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        (DRAWN | {"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        (DRAWN | {"top_k": -1}, "top_k must be at least 0, got -1"),
        (DRAWN | {"eval_temperature": -1.0}, "eval_temperature must be 0 or positive, and finite"),
    ],
)
def test_values_that_are_refused(settings: dict, change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings | change).check()


def test_a_special_token_is_no_stop_string(settings: dict) -> None:
    with pytest.raises(InputError, match=r"got the special token '<\|im_end\|>', which is left ou"):
        prepared(settings, stop=["So<|im_end|>"])


def test_top_p_stands_in_no_other_group(settings: dict, tmp_path: Path) -> None:
    """Training draws from the whole distribution."""
    file = tmp_path / "config.yaml"
    file.write_text("sampling: {top_p: 0.9}\n")
    with pytest.raises(InputError, match="top_p must stand in the group evaluation, got it in sam"):
        gather({}, file)
    setup = prepared(settings, **DRAWN)
    assert not rollout_params(setup).truncates
    assert not greedy_params(setup).truncates
    assert answer_params(setup).truncates


def test_stop_strings_from_a_file_and_the_command_line(settings: dict, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        'data: {context: c.md}\nsampling: {stop: ["\\n\\n", "###"]}\nrun: {output_dir: r}\n'
    )
    assert gather({}, file).stop == ["\n\n", "###"]
    assert gather({"stop": '["a b"]'}, file).stop == ["a b"]
    with pytest.raises(InputError, match=r'stop must be a list of texts, like \["###"\], got'):
        gather({"stop": "###"}, file)


def test_a_step_ends_at_a_stop_string(settings: dict) -> None:
    """What is trained on are the tokens up to the one that completes it."""
    plain = build_distiller(prepared(settings))
    whole = [episode.scored_ids for episode in plain.rollout()]
    decode = prepared(settings).chat.plain_text
    texts = [decode(ids) for ids in whole]
    stop = next(
        x for text in texts for x in text[1:-1] if x.isascii() and x.isprintable() and x != " "
    )
    ended = build_distiller(prepared(settings, stop=[stop])).rollout()
    for before, episode in zip(whole, ended, strict=True):
        count = next((n for n in range(1, 9) if stop in decode(before[:n])), len(before))
        assert episode.scored_ids == before[:count]
        assert episode.finish == ("stop" if stop in decode(before) or before[-1] == 1 else "length")
    assert sum(e.scored_tokens for e in ended) < sum(map(len, whole))


def test_answers_end_in_front_of_a_stop_string(settings: dict) -> None:
    """Their text does, their tokens do not."""
    setup = prepared(settings)
    model = Models(setup).get(setup.config.model)
    whole = answers_alone(model.engine, setup.task.test, greedy_params(setup), setup)
    text = whole[0].text
    stop = next(text[i] for i in range(2, 8) if text[i].strip() and text[i] != "�")
    setup = prepared(settings, stop=[stop])
    found = answers_alone(model.engine, setup.task.test, greedy_params(setup), setup)
    for before, answer in zip(whole, found, strict=True):
        assert answer.text == before.text.split(stop)[0].strip()
        assert stop not in answer.raw
        assert answer.token_ids == before.token_ids[: answer.tokens]
        if stop in before.text:
            assert stop in setup.chat.plain_text(answer.token_ids)
            assert stop not in setup.chat.plain_text(answer.token_ids[:-1])
            assert answer.finish == "stop"
    assert found[0].text != whole[0].text


def test_a_scorecard_says_how_its_answers_were_drawn(settings: dict) -> None:
    plain, drawn = prepared(settings), prepared(settings, **DRAWN, stop=["###"])
    card = evaluate(drawn, None, Progress()).card
    assert card["decoding"] == {
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.95,
        "stop": ["###"],
        "max_completion_tokens": 8,
    }
    assert card["contenders"]["prompted"]["greedy_agreement"]["mean"] == 1.0
    digests = [
        measured_by(prepared(settings, **more))["decoding"] for more in (DRAWN, {"stop": ["#"]})
    ]
    assert len({*digests, measured_by(plain)["decoding"], measured_by(drawn)["decoding"]}) == 4
    again = evaluate(drawn, None, Progress())
    assert again.card["contenders"] == card["contenders"], "the same draws"
    greedy = evaluate(plain, None, Progress())
    assert greedy.card["decoding"]["temperature"] == 0.0
    assert [row["base"] for row in greedy.answers] != [row["base"] for row in again.answers]
    said = "answers are drawn at temperature 0.9, top_k 20 (0: all), top_p 0.95, by the same"
    assert any(fact.startswith(said) for fact in scorecard_facts(card))
    assert not any("drawn at" in fact for fact in scorecard_facts(greedy.card))


def test_memory_counts_the_sort(settings: dict, tmp_path: Path) -> None:
    """Of the whole vocabulary, for each row of a batch."""
    rows, vocabulary = 4, 40_000
    tiny_llama(vocab_size=vocabulary).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings |= {"model": str(tmp_path / "model")}
    found = [memory.Models(prepared(settings, **more)).memory() for more in ({}, DRAWN)]
    phases = [{k: x - it.parts["process"] for k, x in it.phases.items()} for it in found]
    more = phases[1]["scorecard"] - phases[0]["scorecard"]
    assert more > rows * vocabulary * (4 + 8), "ordered logits, and their places"
    assert phases[1]["rollout"] == phases[0]["rollout"]


def test_a_run_with_all_of_it(settings: dict) -> None:
    outcome = train(TrainConfig(**settings | DRAWN | {"steps": 2, "stop": ["e"], "seed": 3}))
    assert outcome.evaluation is not None
    assert outcome.evaluation.card["decoding"]["stop"] == ["e"]
    kept = gather({}, outcome.folder / "config.yaml")
    assert (kept.stop, kept.top_k, kept.top_p, kept.eval_temperature) == (["e"], 20, 0.95, 0.9)
