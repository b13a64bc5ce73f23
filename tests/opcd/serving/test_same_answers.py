"""A served model against the exported one, of which the tiny model's own answers are a copy."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.contenders import load_for_answers
from opcd.evaluation.server import Server
from opcd.serving.same_answers import NEAR, Differing, Served, compared, in_float32, served_answers
from opcd.tasks.prepare import Setup, prepare
from tests.opcd.serving.fake_server import Behaviour


@pytest.fixture
def setup(settings: dict) -> Setup:
    return prepare(TrainConfig(**settings | {"max_completion_tokens": 4}))


def own(setup: Setup) -> list[Served]:
    """What a server says that does everything right."""
    model = load_for_answers(setup, setup.config.model)
    answers = model.alone(setup.task.test)
    found = []
    for case, answer in zip(setup.task.test, answers, strict=True):
        ids = [*case.prompt.student_ids, *answer.token_ids]
        with torch.inference_mode():
            logprobs = model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(case.prompt.student_ids) - 1
        places = [
            dict(enumerate(logprobs[start + i].tolist())) for i in range(len(answer.token_ids))
        ]
        found.append(Served([*case.prompt.student_ids], [*answer.token_ids], answer.finish, places))
    return found


def test_the_same_model_agrees(setup: Setup) -> None:
    same = compared(setup.config.model, setup.task.test, own(setup), setup)
    assert same.agrees
    assert (same.requests, same.other_prompts, same.differing) == (4, 0, [])
    assert same.p_value == 1.0
    assert same.line.startswith("in float32 4 of 4 greedy answers are those of transformers")


def replaced(served: list[Served], logits: float, place: int = 1) -> list[Served]:
    """The first answer with another token at a place, which the server has `logits` above ours."""
    first, *rest = served
    ours = first.token_ids[place]
    other = max((t for t in first.logprobs[place] if t != ours), key=first.logprobs[place].get)  # type: ignore[arg-type]
    places = [dict(p) for p in first.logprobs]
    places[place][other] = places[place][ours] + logits
    ids = [*first.token_ids[:place], other, *first.token_ids[place + 1 :]]
    return [first._replace(token_ids=ids, logprobs=places), *rest]


def test_a_token_that_is_as_likely_may_differ(setup: Setup, monkeypatch: Any) -> None:
    served = own(setup)
    with_another = replaced(served, 0.01)
    same = compared(setup.config.model, setup.task.test, with_another, setup)
    (found,) = same.differing
    assert (found.request, found.place, found.theirs) == (0, 1, with_another[0].token_ids[1])
    # By transformers the margin is that between the two best logits, as the model has them.
    before = served[0].logprobs[1]
    assert found.our_margin == pytest.approx(before[found.ours] - before[found.theirs], abs=1e-4)
    assert found.their_margin == pytest.approx(0.01)
    assert same.agrees == (found.our_margin <= NEAR)
    monkeypatch.setattr("opcd.serving.same_answers.NEAR", found.our_margin + 0.02)
    assert compared(setup.config.model, setup.task.test, with_another, setup).agrees
    far = replaced(served, found.our_margin + 0.03)
    assert not compared(setup.config.model, setup.task.test, far, setup).agrees


@pytest.mark.parametrize(
    ("ours", "theirs", "near"),
    [
        (0.05, 0.09, True),
        (0.2, 0.0, False),
        (0.0, 0.2, False),
        (None, 0.0, False),
        (0.0, None, False),
    ],
)
def test_both_programs_must_find_them_near(
    ours: float | None, theirs: float | None, near: bool
) -> None:
    assert Differing(0, 0, 1, 2, ours, theirs).near == near


def test_other_weights_do_not_agree(setup: Setup, tmp_path: Path) -> None:
    model = load_for_answers(setup, setup.config.model).model
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
    model.save_pretrained(tmp_path)
    setup.tokenizer.save_pretrained(tmp_path)
    same = compared(str(tmp_path), setup.task.test, own(setup), setup)
    assert not same.agrees
    assert "others differ first where both programs" in same.line


def test_a_longer_answer_and_another_prompt_do_not_agree(setup: Setup) -> None:
    served = own(setup)
    longer = [served[0]._replace(token_ids=[*served[0].token_ids, 7]), *served[1:]]
    same = compared(setup.config.model, setup.task.test, longer, setup)
    assert not same.agrees
    assert same.differing[0].our_margin is None
    other = [served[0]._replace(prompt_ids=served[0].prompt_ids[1:]), *served[1:]]
    same = compared(setup.config.model, setup.task.test, other, setup)
    assert not same.agrees
    assert "1 requests were turned into OTHER TOKENS" in same.line


def test_in_16_bits_it_is_by_what_answers_are_worth(settings: dict) -> None:
    """Each word's first letter is right; of eight words one side alone has six."""
    rows = settings["test_data"]
    words = ["cat", "dog", "owl", "ant", "cow", "cod", "doe", "oryx"]
    lines = [f'{{"prompt": "{w}", "answer": "{w[0]}"}}\n' for w in words]
    Path(rows).write_text("".join(lines))
    setup = prepare(TrainConfig(**settings | {"dtype": "bfloat16", "max_completion_tokens": 4}))

    def said(letters: Sequence[str]) -> list[Served]:
        ids = [setup.tokenizer(x, add_special_tokens=False)["input_ids"] for x in letters]
        prompts = [case.prompt.student_ids for case in setup.task.test]
        return [Served([*p], [*i], "stop", []) for p, i in zip(prompts, ids, strict=True)]

    none_right = compared(setup.config.model, setup.task.test, said("zzzzzzzz"), setup)
    assert none_right.dtype == "bfloat16"
    assert len(none_right.differing) == 8
    assert none_right.only_ours == none_right.only_theirs == 0
    assert none_right.agrees, "tokens are not looked at in 16 bits"
    all_right = compared(setup.config.model, setup.task.test, said("cdoaccdo"), setup)
    assert (all_right.only_ours, all_right.only_theirs) == (0, 8)
    assert all_right.p_value == pytest.approx(2 / 2**8)
    assert not all_right.agrees
    assert in_float32(setup).dtype == torch.float32
    assert in_float32(setup).config.dtype == "float32"


def test_what_is_asked_of_a_server_and_read(
    setup: Setup, served: Server, behaviour: Behaviour
) -> None:
    top = [{"token": "token_id:5", "logprob": -0.5}, {"token": "token_id:6", "logprob": -1.5}]
    choice = {
        "finish_reason": "length",
        "token_ids": [5, 6],
        "logprobs": {"content": [{"top_logprobs": top}] * 2},
    }
    behaviour.answer = lambda _: {"prompt_token_ids": [1, 2], "choices": [choice]}
    found = served_answers(served, setup.task.test, setup)
    assert found == [Served([1, 2], [5, 6], "length", [{5: -0.5, 6: -1.5}] * 2)] * 4
    body = behaviour.bodies[0]
    assert body["temperature"] == 0
    assert body["max_tokens"] == 4
    assert body["return_token_ids"]
    assert body["return_tokens_as_token_ids"]
    behaviour.answer = lambda _: {"choices": [{"message": {"content": "c"}}]}
    with pytest.raises(InputError, match="must answer with token ids and log-probabilities"):
        served_answers(served, setup.task.test, setup)
    assert math.isfinite(NEAR)
