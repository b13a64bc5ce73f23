"""Calls of tools, as model families write them."""

import json

import pytest

from opcd.errors import InputError
from opcd.scoring.calls import Call, accepted_calls, calls_in
from opcd.scoring.scorers import load_scorer

PARIS = Call("get_weather", {"city": "Paris"})
RAIN = Call("set_alarm", {"at": "07:00", "days": [1, 2]})
WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
ALARM = '{"name": "set_alarm", "arguments": {"at": "07:00", "days": [1, 2]}}'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f"<tool_call>\n{WEATHER}\n</tool_call><|im_end|>", [PARIS]),
        (f"I look.\n<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{ALARM}\n</tool_call>", 2),
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>', [PARIS]),
        ('<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
        ('{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', [PARIS]),
        ('<function=get_weather>{"city": "Paris"}</function>', [PARIS]),
        (f"[TOOL_CALLS] [{WEATHER}, {ALARM}]</s>", 2),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', [PARIS]),
        ('[TOOL_CALLS]get_weather[CALL_ID]aB3[ARGS]{"city": "Paris"}', [PARIS]),
        (f"<|tool_call|>[{WEATHER}]<|end_of_text|>", [PARIS]),
        (
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
            '```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            [PARIS],
        ),
        (
            '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>',
            [PARIS],
        ),
        (
            '{"function": {"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}}',
            [PARIS],
        ),
        (f"```json\n{WEATHER}\n```", [PARIS]),
        # No calls:
        ("Paris is sunny.", []),
        ("", []),
        ('The record is {"name": "Ann", "city": "Paris"}.', []),
        (f"<tool_call>\n{WEATHER[:-1]}\n</tool_call>", []),  # no JSON
        ('<tool_call>{"name": "f", "arguments": "Paris"}</tool_call>', []),
        ('{"name": "f", "arguments": {}, "parameters": {}}', []),
        ("[get_weather(city='Paris')]", []),
        ('{"name": "f", "description": "Of a city.", "parameters": {"type": "object"}}', []),
        ("{" * 3000, []),
    ],
)
def test_calls_are_found_as_families_write_them(text: str, calls: list[Call] | int) -> None:
    found = calls_in(text)
    assert found == ([PARIS, RAIN] if calls == 2 else calls)


def test_calls_are_found_in_a_letter_and_its_accent() -> None:
    (call,) = calls_in('Cafe\u0301 {"name": "f", "arguments": {"at": "Cafe\u0301"}}')
    assert call == Call("f", {"at": "Caf\u00e9"})


@pytest.mark.parametrize("spelled", ["Cafe\u0301", r"Cafe\u0301", "Caf\u00e9", r"Caf\u00e9"])
@pytest.mark.parametrize("accepted", ["Cafe\u0301", r"Cafe\u0301", "Caf\u00e9", r"Caf\u00e9"])
def test_a_letter_and_its_accent_are_one_however_they_are_spelled(
    spelled: str, accepted: str
) -> None:
    call = '{{"name": "f", "arguments": {{"{0}": ["{0}"]}}}}'.format
    assert rates(call(spelled), call(accepted))["right arguments"] == 1
    assert load_scorer("json")(call(spelled), [call(accepted)]).value == 1


def rates(completion: str, *accepted: str) -> dict[str, float]:
    return load_scorer("calls")(completion, accepted).rates


@pytest.mark.parametrize(
    ("completion", "accepted", "reached"),
    [
        (WEATHER, WEATHER, (1, 1, 1)),
        ("It rains.", WEATHER, (0, 0, 0)),
        (ALARM, WEATHER, (1, 0, 0)),
        (WEATHER.replace("Paris", "Rome"), WEATHER, (1, 1, 0)),
        (f"[{ALARM}, {WEATHER}]", f"[{WEATHER}, {ALARM}]", (1, 1, 1)),  # parallel: no order
        (WEATHER, f"[{WEATHER}, {ALARM}]", (1, 0, 0)),
        (f"[{WEATHER}, {WEATHER}]", WEATHER, (1, 0, 0)),
        (
            '{"name": "f", "arguments": {"n": 1.0}}',
            '{"name": "f", "arguments": {"n": 1}}',
            (1,) * 3,
        ),
        (
            '{"name": "f", "arguments": {"n": true}}',
            '{"name": "f", "arguments": {"n": 1}}',
            (1, 1, 0),
        ),
        (
            '{"name": "f", "arguments": {"n": "1"}}',
            '{"name": "f", "arguments": {"n": 1}}',
            (1, 1, 0),
        ),
        (f"<think>{ALARM}</think>{WEATHER}", WEATHER, (1, 1, 1)),
        (f"<think>{WEATHER}</think>Sunny.", WEATHER, (0, 0, 0)),
        (f"<think>{WEATHER}", WEATHER, (0, 0, 0)),
    ],
)
def test_rates_of_a_call_that_is_wanted(
    completion: str, accepted: str, reached: tuple[int, ...]
) -> None:
    found = load_scorer("calls")(completion, [accepted])
    assert tuple(found.rates) == ("called when needed", "right tool", "right arguments")
    assert tuple(found.rates.values()) == reached
    assert found.value == (sum(reached) == 3)


def test_rates_where_no_call_is_wanted() -> None:
    assert rates("Good morning!", "Hello.") == {"not called without need": 1.0}
    assert rates(WEATHER, "Hello.") == {"not called without need": 0.0}


def test_one_of_several_answers_is_enough() -> None:
    rome = WEATHER.replace("Paris", "Rome")
    assert rates(rome, WEATHER, rome)["right arguments"] == 1
    assert rates(rome, ALARM, WEATHER) == {
        "called when needed": 1,
        "right tool": 1,
        "right arguments": 0,
    }
    scorer = load_scorer("calls")
    for completion, value in ((WEATHER, 1), ("It is sunny.", 1), (ALARM, 0)):
        assert scorer(completion, [WEATHER, "Sunny."]) == (value, {})


def test_calls_are_read_with_their_special_tokens() -> None:
    raw = '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}</s>'
    scorer = load_scorer("calls")
    assert scorer('get_weather{"city": "Paris"}', [WEATHER], raw).value == 1


@pytest.mark.parametrize("text", [WEATHER, f"[{WEATHER}]", f" [{WEATHER}, {ALARM}]\n", "Hello."])
def test_accepted_answers(text: str) -> None:
    assert load_scorer("calls").fault(text) is None
    expected = [] if text == "Hello." else json.loads(text)
    names = [c["name"] for c in (expected if isinstance(expected, list) else [expected])]
    assert [c.name for c in accepted_calls(text)] == names


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{WEATHER}\n</tool_call>",  # as Hermes' recorded conversations have them
        f"I look.\n<tool_call>\n{WEATHER}\n</tool_call>",
        f"[TOOL_CALLS] [{WEATHER}]",
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
        '<function=get_weather>{"city": "Paris"}</function>',
        f"```json\n{WEATHER}\n```",
        f"<think>It is {ALARM}</think>{WEATHER}",
    ],
)
def test_accepted_answers_as_families_write_calls(text: str) -> None:
    assert load_scorer("calls").fault(text) is None
    assert accepted_calls(text) == [PARIS]
    assert rates(WEATHER, text) == dict.fromkeys(rates(WEATHER, WEATHER), 1.0)


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{WEATHER[:-1]}\n</tool_call>",
        f"<tool_call>{WEATHER}</tool_call><tool_call>{WEATHER[:-1]}</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}",
        "[TOOL_CALLS] get_weather(Paris)",
    ],
)
def test_accepted_answers_with_marks_of_calls_that_cannot_be_read_are_refused(text: str) -> None:
    fault = load_scorer("calls").fault
    assert fault is not None
    assert "no call that can be read, behind " in (fault(text) or "")


@pytest.mark.parametrize(
    "text", ['{"name": "f"}', "[]", "[1]", WEATHER[:-1], f"[{WEATHER}, 3]", f"{WEATHER} please"]
)
def test_accepted_answers_that_are_no_calls_are_refused(text: str) -> None:
    fault = load_scorer("calls").fault
    assert fault is not None
    assert 'write {"name": ..., "arguments": {...}}' in (fault(text) or "")


def test_the_scorer_is_offered() -> None:
    with pytest.raises(InputError, match="json, math, calls, regex:PATTERN"):
        load_scorer("call")
