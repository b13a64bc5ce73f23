"""A served model against the exported one, of which the tiny model's own answers are a copy."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.contenders import load_for_answers
from opcd.evaluation.server import Server
from opcd.serving.apart import NEAR, Apart, apart, unit_at
from opcd.serving.same_answers import Differing, Served, compared, in_float32, served_answers
from opcd.tasks.prepare import Setup, prepare
from tests.opcd.serving.fake_server import Behaviour


@pytest.fixture
def setup(settings: dict) -> Setup:
    return prepare(TrainConfig(**settings | {"max_completion_tokens": 4}))


def own(setup: Setup, model: str = "") -> list[Served]:
    """What a server of a model, by its folder, says that does everything right."""
    loaded = load_for_answers(setup, model or setup.config.model)
    answers = loaded.alone(setup.task.test)
    found = []
    for case, answer in zip(setup.task.test, answers, strict=True):
        ids = [*case.prompt.student_ids, *answer.token_ids]
        with torch.inference_mode():
            logprobs = loaded.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        start = len(case.prompt.student_ids) - 1
        places = [
            dict(enumerate(logprobs[start + i].tolist())) for i in range(len(answer.token_ids))
        ]
        found.append(Served([*case.prompt.student_ids], [*answer.token_ids], answer.finish, places))
    return found


def saved(setup: Setup, folder: Path, change: Callable[[Any], None]) -> str:
    """The folder of the model with a change."""
    model = load_for_answers(setup, setup.config.model).model
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    setup.tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_same_model_agrees(setup: Setup) -> None:
    same = compared(setup.config.model, setup.task.test, own(setup), setup)
    assert same.agrees
    assert (same.requests, same.other_prompts, same.differing) == (4, 0, [])
    assert same.p_value == 1.0
    assert same.line.startswith("in float32 4 of 4 greedy answers are those of transformers")
    assert same.apart.nats < 1e-4
    assert same.apart.allowed == NEAR
    assert "of its tokens differ by at most" in same.line


def replaced(served: list[Served], logits: float, place: int = 1) -> list[Served]:
    """The first answer, ended by another token at a place, which the server has `logits` above
    ours."""
    first, *rest = served
    ours = first.token_ids[place]
    other = max((t for t in first.logprobs[place] if t != ours), key=first.logprobs[place].get)  # type: ignore[arg-type]
    places = [dict(p) for p in first.logprobs[: place + 1]]
    places[place][other] = places[place][ours] + logits
    ids = [*first.token_ids[:place], other]
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
    for name in ("same_answers", "apart"):
        monkeypatch.setattr(f"opcd.serving.{name}.NEAR", found.our_margin + 0.02)
    assert compared(setup.config.model, setup.task.test, with_another, setup).agrees
    far = replaced(served, found.our_margin + 0.03)
    assert not compared(setup.config.model, setup.task.test, far, setup).agrees


@pytest.mark.parametrize(
    ("ours", "theirs", "unit", "near"),
    [
        (0.05, 0.09, 0.0, True),
        (0.2, 0.0, 0.0, False),
        (0.0, 0.2, 0.0, False),
        (None, 0.0, 0.0, False),
        (0.0, None, 0.0, False),
        (-0.25, 0.125, 0.125, True),
        (-0.25, 0.375, 0.125, False),
        (0.26, 0.0, 0.125, False),
        (0.09, 0.0, 0.001, True),
    ],
)
def test_both_programs_must_find_them_near(
    ours: float | None, theirs: float | None, unit: float, near: bool
) -> None:
    assert Differing(0, 0, 1, 2, ours, theirs, unit).near == near


def test_a_unit_in_the_last_place() -> None:
    for logit in (22.2, -17.0, 0.3, 35.0, 16.0):
        number = torch.tensor(logit, dtype=torch.bfloat16)
        after = torch.nextafter(number, number * 2) - number
        assert unit_at(number.item(), torch.bfloat16) == abs(after.item())
    assert unit_at(22.2, torch.bfloat16) == 0.125
    assert unit_at(0.0, torch.bfloat16) > 0


def test_other_weights_do_not_agree(setup: Setup, tmp_path: Path) -> None:
    """As of an adapter that was left out, or of a head that is stale."""
    model = saved(setup, tmp_path, lambda m: m.model.layers[0].mlp.down_proj.weight.mul_(-3))
    same = compared(model, setup.task.test, own(setup), setup)
    assert not same.agrees
    assert "others differ first where both programs" in same.line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_weights_that_say_the_same_do_not_agree(
    settings: dict, tmp_path: Path, dtype: str
) -> None:
    """Whose likeliest tokens are those of the model, by other probabilities."""
    setup = prepare(TrainConfig(**settings | {"max_completion_tokens": 4, "dtype": dtype}))
    model = saved(setup, tmp_path / "colder", lambda m: m.model.norm.weight.mul_(0.5))
    served = own(setup)
    same = compared(model, setup.task.test, served, setup)
    assert same.differing == []
    assert same.p_value == 1
    assert not same.apart.agrees
    assert not same.agrees
    assert compared(model, setup.task.test, own(setup, model), setup).agrees


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


def test_tokens_that_the_model_does_not_have(setup: Setup) -> None:
    for wrong in (-1, 258, 10**9):
        served = [own(setup)[0]._replace(token_ids=[wrong])] * 4
        with pytest.raises(InputError, match=rf"tokens of the model's 258, got {wrong}; is it ano"):
            compared(setup.config.model, setup.task.test, served, setup)


def test_how_far_log_probabilities_may_be_apart() -> None:
    assert apart([-1.0, -2.05], [-1.01, -2.0], None) == pytest.approx((0.05, None, NEAR))
    assert not apart([-1.0, -2.2], [-1.0, -2.0], None).agrees
    exact = [0.0, 0.0]
    assert apart([0.3, -0.3], [0.2, -0.2], exact) == pytest.approx((0.3, 0.2, 0.4))
    assert not apart([0.5, -0.5], [0.2, -0.2], exact).agrees
    assert apart([0.09, -0.09], [0.001, 0.0], exact).agrees, "so near are float32's, too"
    # What nobody knows agrees with nothing.
    for unknown in ([math.nan, 0.0], [0.0, math.nan]):
        assert not apart(unknown, [0.0, 0.0], None).agrees
        assert not apart(unknown, [0.0, 0.0], exact).agrees
    assert not apart([], [], None).agrees
    assert not apart([], [], []).agrees


def test_in_16_bits_it_is_by_rounding_and_by_what_answers_are_worth(settings: dict) -> None:
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

    same = compared(setup.config.model, setup.task.test, own(setup), setup)
    assert same.agrees
    assert same.dtype == "bfloat16"
    assert same.apart.own is not None
    assert same.apart.nats == pytest.approx(same.apart.own, rel=0.5)
    assert same.apart.own > 1e-4, "float32's are others"
    assert "transformers' own by" in same.line
    rounded = Apart(0.0, 0.0, NEAR)
    none_right = compared(setup.config.model, setup.task.test, said("zzzzzzzz"), setup)
    assert len(none_right.differing) == 8
    assert "or two units in the last place, of each other" in none_right.line
    assert none_right.only_ours == none_right.only_theirs == 0
    assert not none_right.agrees
    assert none_right._replace(apart=rounded).agrees, "where answers differ first says little"
    all_right = compared(setup.config.model, setup.task.test, said("cdoaccdo"), setup)
    assert (all_right.only_ours, all_right.only_theirs) == (0, 8)
    assert all_right.p_value == pytest.approx(2 / 2**8)
    assert not all_right._replace(apart=rounded).agrees
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
    for wrong in ({"token_ids": [math.inf]}, {"logprobs": {"content": [{"top_logprobs": [7]}]}}):
        behaviour.answer = lambda _, w=wrong: {"prompt_token_ids": [1], "choices": [choice | w]}  # type: ignore[misc]
        with pytest.raises(InputError, match="must answer with token ids and log-probabilities"):
            served_answers(served, setup.task.test, setup)
    unnamed = {"top_logprobs": [{"token": 7, "logprob": 0.0}]}
    behaviour.answer = lambda _: {
        "prompt_token_ids": [1],
        "choices": [choice | {"logprobs": {"content": [unnamed]}}],
    }
    with pytest.raises(InputError, match="AttributeError"):
        served_answers(served, setup.task.test, setup)
