"""Tools in data: calls, results and schemas as people write them, and what each mistake is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from opcd.api.inputs import Inputs
from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.measured import measured_by
from opcd.preflight.rendering import rendering
from opcd.tasks.contexts import Context, read_contexts
from opcd.tasks.data import check_disjoint, check_same_answers, read_examples, request_of
from opcd.tasks.messages import assistant, system, user
from opcd.tasks.prepare import Setup, prepare
from opcd.tasks.task import read_task_files
from opcd.tasks.tools import calls_text
from tests.conftest import tiny_llama, tiny_tokenizer, write_jsonl
from tests.opcd.tasks.templates import TOOL_FAMILIES
from tests.opcd.tasks.test_tool_templates import CALL, CLOCK, CONTEXT, RAIN, TOOL

NOTHING = {"": Context([])}
CALLED = {"name": "weather", "arguments": {"city": "Bonn", "days": 2}}
PLAIN = {"type": "function", "function": CALLED}  # a call without an id
ASKED = user("Rain in Bonn?")
GIVEN = {"role": "tool", "content": '{"rain": true}'}


def read(folder: Path, *rows: Any, contexts: Any = NOTHING, wants_answers: bool = False) -> Any:
    path = write_jsonl(folder / "d.jsonl", list(rows))
    return read_examples(str(path), wants_answers, contexts)


def calling(**changes: Any) -> dict:
    return {"role": "assistant", "content": ""} | changes


TEXT = json.dumps(CALLED["arguments"])
SHAREGPT = [
    {"from": "human", "value": "Rain in Bonn?"},
    {"from": "function_call", "value": json.dumps(CALLED)},
    {"from": "observation", "value": '{"rain": true}'},
]


@pytest.mark.parametrize(
    "messages",
    [
        [ASKED, calling(tool_calls=[PLAIN]), GIVEN],
        [ASKED, calling(content=None, tool_calls=[PLAIN], refusal=None), GIVEN | {"name": None}],
        [ASKED, {"role": "assistant", "tool_calls": [{"function": CALLED}]}, GIVEN],
        [ASKED, calling(tool_calls=[CALLED | {"arguments": TEXT}]), GIVEN],
        [ASKED, calling(content=" ", tool_calls=[CALLED]), GIVEN],
        [
            ASKED,
            calling(content=[], tool_calls=[CALLED]),
            GIVEN | {"content": [{"type": "text", "text": '{"rain": true}'}]},
        ],
        [ASKED, calling(function_call=CALLED | {"arguments": TEXT}), GIVEN],
        SHAREGPT,
        [SHAREGPT[0], {"from": "function_call", "value": CALLED}, SHAREGPT[2] | {"from": "tool"}],
    ],
)
def test_forms_of_calls_and_results(tmp_path: Path, messages: list) -> None:
    ((example,), _) = read(tmp_path, {"messages": messages})
    assert list(example.messages) == [ASKED, calling(tool_calls=[PLAIN]), GIVEN]
    assert example.text == "Rain in Bonn?"


def test_ids_and_names_are_kept(tmp_path: Path) -> None:
    older = [ASKED, calling(function_call=CALLED), {"role": "function", "name": "weather"} | GIVEN]
    ((one, other), said) = read(
        tmp_path,
        {"messages": RAIN},
        {"messages": [m | {"role": "function"} if m is older[2] else m for m in older]},
    )
    assert list(one.messages) == RAIN
    assert other.messages[2] == GIVEN | {"name": "weather"}
    assert said == [
        'd.jsonl: 2 plain rows; "function_call" read as a call of a tool (1 of 2)',
    ]


def numbered(number: str, name: str = "weather") -> dict:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": {}}}


def result(**keys: str) -> dict:
    return {"role": "tool", "content": "so"} | keys


@pytest.mark.parametrize(
    "turns",
    [
        [calling(tool_calls=[numbered("a"), numbered("b")]), *map(dict, [result()] * 2)],
        [
            calling(tool_calls=[numbered("a"), numbered("b", "clock")]),
            result(tool_call_id="b"),
            result(tool_call_id="a", name="weather"),
        ],
        [
            calling(tool_calls=[numbered("a"), numbered("b", "clock")]),
            result(name="clock"),
            result(name="weather"),
        ],
        [calling(tool_calls=[PLAIN, numbered("b")]), result(tool_call_id="x"), result()],
        [
            calling(tool_calls=[numbered("a")]),
            calling(tool_calls=[numbered("b")]),
            result(tool_call_id="b"),
            result(tool_call_id="a"),
        ],
        [
            calling(tool_calls=[numbered("a")]),
            result(),
            calling(tool_calls=[numbered("a")]),
            result(),
        ],
    ],
)
def test_results_that_answer_calls(tmp_path: Path, turns: list) -> None:
    ((example,), _) = read(tmp_path, {"messages": [ASKED, *turns]})
    assert list(example.messages) == [ASKED, *turns]
    ((example,), _) = read(tmp_path, {"messages": [ASKED, *turns, assistant("Yes."), user("Why?")]})
    assert example.text == "Why?"


CALLS_A = calling(tool_calls=[numbered("a")])
BAD = {
    "arguments that are no JSON": (
        [ASKED, calling(tool_calls=[CALLED | {"arguments": '{"city": Bonn}'}]), GIVEN],
        "message 1: call 0: the arguments of 'weather' must be JSON, got '{\"city\": Bonn}' "
        "(Expecting value: line 1 column 10 (char 9)); correct it",
    ),
    "arguments that are no object": (
        [ASKED, calling(tool_calls=[PLAIN, CALLED | {"arguments": "[1]"}]), GIVEN],
        "message 1: call 1: the arguments of 'weather' must be a JSON object, got [1]; name each",
    ),
    "arguments with a key twice": (
        [ASKED, calling(tool_calls=[CALLED | {"arguments": '{"a": 1, "a": 2}'}]), GIVEN],
        "message 1: call 0: the arguments of 'weather' must be JSON, got '{\"a\": 1, \"a\": 2}' (a "
        "key that stands twice among ['a', 'a']); correct it",
    ),
    "a number beyond all others": (
        [ASKED, calling(tool_calls=[CALLED | {"arguments": '{"a": 1e999}'}]), GIVEN],
        "message 1: call 0 must be JSON, got a number that is too large for one; correct it",
    ),
    "half a character": (
        [ASKED, calling(tool_calls=[CALLED | {"arguments": {"city": "\ud800"}}]), GIVEN],
        "message 1: call 0 must be valid Unicode, got the lone surrogate '\\ud800'; correct the "
        "escape",
    ),
    "no arguments": (
        [ASKED, calling(tool_calls=[{"name": "now"}]), GIVEN],
        "message 1: call 0 must be {\"name\": ..., \"arguments\": {...}}, got {'name': 'now'}; "
        "correct it ({} where it takes none)",
    ),
    "no name": (
        [ASKED, calling(tool_calls=[{"name": "", "arguments": {}}]), GIVEN],
        'message 1: call 0: "name" must be that of a function, text without spaces around it, got '
        "''; correct it",
    ),
    "another kind of call": (
        [ASKED, calling(tool_calls=[{"type": "custom", "name": "x", "arguments": "{}"}]), GIVEN],
        "message 1: call 0 must be of a function, got type 'custom'; remove it",
    ),
    "a key that would be lost": (
        [ASKED, calling(tool_calls=[PLAIN | {"function": CALLED | {"strict": True}}]), GIVEN],
        'message 1: call 0 must be {"name": ..., "arguments": {...}} with an id at most, got '
        "strict, which the models would not see; remove it",
    ),
    "calls that are no list": (
        [ASKED, calling(tool_calls=CALLED), GIVEN],
        "message 1 must have a list of calls, got {'name': 'weather', 'arguments': {'city': "
        "'Bonn', 'days': 2}}",
    ),
    "calls in two places": (
        [ASKED, calling(tool_calls=[PLAIN], function_call=CALLED), GIVEN],
        'message 1 must have its calls in one place, got "tool_calls" and "function_call"; remove '
        "one",
    ),
    "a call of the user's": (
        [ASKED | {"tool_calls": [PLAIN]}],
        "message 0 must be the assistant's to have \"tool_calls\", got one of role 'user'; correct "
        "the role, or remove it",
    ),
    "ShareGPT's call that is no JSON": (
        [SHAREGPT[0], {"from": "function_call", "value": "weather(Bonn)"}, SHAREGPT[2]],
        "message 1 must be JSON, got 'weather(Bonn)' (Expecting value: line 1 column 1 (char 0)); "
        "correct it",
    ),
    "a result without a call": (
        [ASKED, GIVEN],
        "message 1 must answer a call of the assistant's turn in front of it, got the result of a "
        "tool that no call is left for; remove it, or add the call",
    ),
    "more results than calls": (
        [ASKED, calling(tool_calls=[PLAIN]), GIVEN, GIVEN],
        "message 3 must answer a call of the assistant's turn in front of it, got the result of a "
        "tool that no call is left for; remove it, or add the call",
    ),
    "a result behind an answer": (
        [ASKED, calling(tool_calls=[PLAIN]), GIVEN, assistant("Yes."), GIVEN],
        "message 4 must answer a call of the assistant's turn in front of it, got the result of a "
        "tool that no call is left for; remove it, or add the call",
    ),
    "a result of another id": (
        [ASKED, CALLS_A, result(tool_call_id="b")],
        "message 2 must answer a call of the assistant's turn in front of it, got the id 'b' where "
        "'a' wait; correct it",
    ),
    "a result of another function": (
        [ASKED, CALLS_A, result(tool_call_id="a", name="clock")],
        "message 2 must answer a call of the assistant's turn in front of it, got what 'clock' "
        "gave where weather was called; correct it",
    ),
    "two calls of one id": (
        [ASKED, calling(tool_calls=[numbered("a"), numbered("a")]), result(), result()],
        "calls must have an id each, got 'a' twice in message 1; correct one",
    ),
    "a call without a result": (
        [ASKED, CALLS_A, user("Well?")],
        "every call must have its result before message 2, got none for the call of 'weather' in "
        "message 1; add a message of the role tool, or remove the call",
    ),
    "one of two results": (
        [ASKED, calling(tool_calls=[numbered("a"), numbered("b", "clock")]), result()],
        "every call must have its result before the model goes on, got none for the call of "
        "'clock' in message 1; add a message of the role tool, or remove the call",
    ),
    "one of two results, then the assistant": (
        [
            ASKED,
            calling(tool_calls=[numbered("a"), numbered("b")]),
            result(),
            assistant("x"),
            ASKED,
        ],
        "every call must have its result before message 3, got none for the call of 'weather' in "
        "message 1; add a message of the role tool, or remove the call",
    ),
    "the assistant first": (
        [assistant("Hello."), ASKED, calling(tool_calls=[PLAIN]), GIVEN],
        "a conversation with tools must begin with a user message, got the assistant's as message "
        "0; remove it, or write what it answers",
    ),
    "an empty turn": (
        [ASKED, calling(tool_calls=[]), ASKED],
        "the content of message 1 must be a non-empty string, got ''; leave that message out, or "
        "write what it says",
    ),
    "an empty result": (
        [ASKED, calling(tool_calls=[PLAIN]), GIVEN | {"content": " "}],
        "the content of message 2 must be a non-empty string, got ' '; leave that message out, or "
        "write what it says",
    ),
    "a result that is no text": (
        [ASKED, calling(tool_calls=[PLAIN]), GIVEN | {"content": {"rain": True}}],
        "the content of message 2, what a tool gave, must be text, got {'rain': True}; write it as "
        "the models shall read it, JSON as its text",
    ),
    "a result that is a list": (
        [ASKED, calling(tool_calls=[PLAIN]), GIVEN | {"content": [1, 2]}],
        "the content of message 2, what a tool gave, must be text, got [1, 2]; write it as the "
        "models shall read it, JSON as its text",
    ),
    "a result that is an image": (
        [ASKED, calling(tool_calls=[PLAIN]), GIVEN | {"content": [{"type": "image_url"}]}],
        "the content of message 2 must be text, got a part of type 'image_url'; images, sounds and "
        "files are not supported; leave that row out",
    ),
    "calls as parts": (
        [ASKED, calling(content=[{"type": "tool_use", "name": "weather", "input": {}}]), ASKED],
        "the content of message 1 must be text, got a part of type 'tool_use'; write calls as "
        '"tool_calls" of the assistant\'s message, and what a tool gave as a message of the role '
        '"tool"',
    ),
    "an unknown role": (
        [ASKED, {"role": "robot", "content": "x"}],
        "the role of message 1 must be one of system, developer, user, assistant, tool, function, "
        "got 'robot'; correct it",
    ),
    "an unknown role of ShareGPT's": (
        [SHAREGPT[0], {"from": "robot", "value": "x"}],
        "the role of message 1 must be one of system, human, user, gpt, chatgpt, assistant, model, "
        "function_call, observation, tool, got 'robot'; correct it",
    ),
    "an id that is no text": (
        [ASKED, calling(tool_calls=[PLAIN | {"id": 3}]), GIVEN],
        'message 1: call 0: "id" must be text, got 3; correct it',
    ),
    "an id of a result that is no text": (
        [ASKED, calling(tool_calls=[PLAIN]), GIVEN | {"tool_call_id": 3}],
        '"tool_call_id" of message 2 must be text, got 3; correct it',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_conversations_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    messages, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("d.jsonl"), [{"messages": RAIN}, {"messages": messages}])
    with pytest.raises(InputError) as refused:
        read_examples("d.jsonl", False, NOTHING)
    assert str(refused.value) == f"d.jsonl:2: {message}"


def test_calls_are_an_answer_as_json(tmp_path: Path) -> None:
    """Keys of arguments in one order, whatever was written; a text beside them is no answer."""
    turned = {"name": "weather", "arguments": '{"days": 2, "city": "Bonn"}'}
    rows = [
        {"messages": [ASKED, calling(content="Let me see.", tool_calls=[PLAIN])]},
        {"messages": [ASKED, calling(tool_calls=[turned])]},
        {
            "prompt": [user("Both?")],
            "completion": [calling(tool_calls=[CALL, numbered("b", "now")])],
        },
        {"messages": [*RAIN[:3], assistant("Yes.")]},
        {"messages": [user("Hm?"), calling(tool_calls=[PLAIN])], "answer": "weather"},
        {"conversations": [{"from": "human", "value": "So?"}, SHAREGPT[1]]},
    ]
    examples, said = read(tmp_path, *rows, wants_answers=True)
    bonn = '{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}'
    assert [e.answers for e in examples] == [
        (bonn,),
        (bonn,),
        (f'[{bonn}, {{"name": "now", "arguments": {{}}}}]',),
        ("Yes.",),
        ("weather",),
        (bonn,),
    ]
    assert "the calls of the last assistant message are the answer, as JSON (3 of 6)" in said[0]
    assert 'the calls of "completion" are the answer, as JSON (1 of 6)' in said[0]
    check_same_answers(examples)
    ((training, *_), said) = read(tmp_path, *rows)
    assert list(training.messages) == [ASKED]
    assert "the last assistant message left out (5 of 6)" in said[0]


def test_calls_belong_to_what_is_asked(tmp_path: Path) -> None:
    """But not their ids."""
    other = calling(tool_calls=[PLAIN | {"function": CALLED | {"arguments": {"city": "Ulm"}}}])
    (one, same, ulm, alone), _ = read(
        tmp_path,
        {"messages": RAIN[:3]},
        {"messages": [ASKED, calling(tool_calls=[PLAIN]), GIVEN]},
        {"messages": [ASKED, other, GIVEN]},
        {"messages": [ASKED]},
    )
    assert request_of(one) == request_of(same)
    assert len({request_of(e) for e in (one, ulm, alone)}) == 3
    check_disjoint({"train": [one, alone], "test": [ulm]}, NOTHING)
    with pytest.raises(
        InputError, match=r"1 overlap: .*d.jsonl:2 is .*d.jsonl:1 \('Rain in Bonn\?'"
    ):
        check_disjoint({"train": [one], "test": [same]}, NOTHING)
    shown = {"": Context([*CONTEXT, *RAIN[:4]])}
    check_disjoint({"test": [ulm]}, shown)
    for example in (same, alone):
        with pytest.raises(InputError, match="is demonstration 1 of the context"):
            check_disjoint({"test": [example]}, shown)


def test_demonstrations_with_calls_are_taken_out(tmp_path: Path) -> None:
    """Whatever their ids; a request may begin as one of them does, and go on otherwise."""
    context = {"": Context([*CONTEXT, *RAIN[:4]])}
    row = [*CONTEXT, ASKED, calling(tool_calls=[PLAIN]), GIVEN, assistant("Yes."), user("Why?")]
    ((example,), said) = read(tmp_path, {"messages": row}, contexts=context)
    assert list(example.messages) == [user("Why?")]
    assert said == ["d.jsonl: 1 OpenAI row; the whole context was taken out"]
    dry = [*RAIN[:2], GIVEN | {"content": '{"rain": false}'}]
    ((example,), _) = read(tmp_path, {"messages": dry}, contexts=context)
    assert len(example.messages) == 3
    more = Context([*CONTEXT, user("Hi"), assistant("Hello"), *RAIN[:4]])
    with pytest.raises(InputError, match="must begin with all demonstrations of its context"):
        read(tmp_path, {"messages": row}, contexts={"": more})
    other = calling(tool_calls=[numbered("a")])
    row = [*CONTEXT, ASKED, other, GIVEN, assistant("Yes."), user("Why?")]
    ((example,), _) = read(tmp_path, {"messages": row}, contexts=context)
    assert len(example.messages) == 5


WITH_TOOLS = {"": Context(CONTEXT, (TOOL, CLOCK))}


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [TOOL, CLOCK]},
        {"tools": [CLOCK["function"], TOOL["function"]], "tool_choice": "auto"},
        {"tools": json.dumps([TOOL["function"], {"type": "function"} | CLOCK["function"]])},
        {"functions": [TOOL["function"], CLOCK["function"] | {"parameters": None}]},
    ],
)
def test_tools_of_a_row_that_are_the_contexts(tmp_path: Path, tools: dict) -> None:
    note = "its tools are the context's and were taken out"
    ((example,), said) = read(tmp_path, {"prompt": "Why?"} | tools, contexts=WITH_TOOLS)
    assert list(example.messages) == [user("Why?")]
    assert said[0].startswith(f"d.jsonl: 1 plain row; {note}")
    body = {"body": {"messages": [user("Why?")], "model": "m"} | tools}
    ((example,), said) = read(tmp_path, body, contexts=WITH_TOOLS)
    assert said[0].startswith(f"d.jsonl: 1 OpenAI batch row; {note}; columns left out: body.model")
    assert "body.tools" not in said[0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tools": [TOOL]}, "got weather where the context has clock, weather; put them into the"),
        (
            {"tools": [TOOL, CLOCK | {"function": {"name": "clock"}}]},
            "must be its context's, got another schema of clock; put them into the context",
        ),
        (
            {"tools": [TOOL, TOOL]},
            "tools must have a name each, got 'weather' for tool 0 and tool 1",
        ),
        ({"tools": "weather"}, "\"tools\" must be JSON, got 'weather' "),
        ({"tools": {"name": "x"}}, '"tools" must be a list of tools like {"type": "function"'),
        ({"tools": ["weather"]}, '"tools": tool 0 must be like {"type": "function"'),
        ({"tools": [{"type": "web_search"}]}, "tool 0 must be a function, got type 'web_search'"),
        (
            {"tools": [TOOL | {"strict": True}]},
            'must have nothing beside "type" and "function", got',
        ),
        (
            {"tools": [{"name": "x", "parameters": []}]},
            '"parameters" must be a JSON schema, an obj',
        ),
        ({"tools": [{"name": "x", "description": 3}]}, '"description" must be text, got 3'),
        (
            {"tools": [{"name": "x", "input_schema": {}}]},
            'as "parameters", got "input_schema"; ren',
        ),
        ({"tools": [TOOL], "functions": [TOOL]}, 'one place, got "tools" and "functions"'),
        ({"tool_choice": "required"}, '"tool_choice" must be "auto", got \'required\', which the'),
        (
            {"tools": [TOOL, CLOCK], "tool_choice": "none"},
            '"tool_choice" must be "auto", got \'none',
        ),
        ({"function_call": {"name": "x"}}, '"function_call" must be "auto", got'),
        ({"tool_calls": [PLAIN]}, '"tool_calls" must stand in the message that calls'),
    ],
)
def test_tools_of_a_row_that_are_refused(tmp_path: Path, columns: dict, message: str) -> None:
    with pytest.raises(InputError) as refused:
        read(tmp_path, {"prompt": "Why?"}, {"prompt": "How?"} | columns, contexts=WITH_TOOLS)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'd.jsonl'}:2: ")


def test_columns_that_say_nothing_of_tools(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "tools": [], "tool_choice": "none"}, {"prompt": "b", "tools": "[]"}]
    assert read(tmp_path, *rows)[1] == [
        "d.jsonl: 2 plain rows; columns left out: tool_choice, tools"
    ]


def contexts_of(folder: Path, value: Any) -> Any:
    (folder / "c.json").write_text(json.dumps(value), encoding="utf-8")
    return read_contexts(str(folder / "c.json"))


def test_contexts_with_tools(tmp_path: Path) -> None:
    tools = [TOOL["function"], CLOCK]
    expected = Context(CONTEXT, (TOOL, CLOCK))
    two = "c.json: 2 tools: weather, clock"
    assert contexts_of(tmp_path, {"messages": CONTEXT, "tools": tools}) == ({"": expected}, [two])
    assert contexts_of(
        tmp_path, {"model": "m", "messages": [*CONTEXT, *RAIN[:3]], "functions": tools}
    ) == (
        {"": expected},
        [
            "c.json: the last user message and the tools' turns behind it are the request and were "
            "left out; settings left out: model; 2 tools: weather, clock"
        ],
    )
    assert contexts_of(tmp_path, {"messages": [*CONTEXT, *RAIN], "tools": [TOOL]})[0] == {
        "": Context([*CONTEXT, *RAIN[:4]], (TOOL,))
    }
    assert contexts_of(tmp_path, {"messages": [], "tools": [TOOL]})[0] == {"": Context([], (TOOL,))}
    assert contexts_of(tmp_path, {"messages": [user("Why?")], "tools": [TOOL]})[0] == {
        "": Context([], (TOOL,))
    }
    several = {"bank": {"messages": CONTEXT, "tools": [TOOL]}, "shop": "Be kind.", "tools": "x y"}
    found, said = contexts_of(tmp_path, several)
    assert found == {
        "bank": Context(CONTEXT, (TOOL,)),
        "shop": Context([system("Be kind.")]),
        "tools": Context([system("x y")]),
    }
    assert said == [
        "c.json: 3 contexts, which rows name: bank, shop, tools",
        "c.json: bank: 1 tool: weather",
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"tools": [TOOL]}, 'with tools must be {"messages": [...], "tools": [...]}, got tools'),
        ({"system": "x", "tools": [TOOL]}, "got system, tools; write its texts as"),
        (
            {"messages": CONTEXT, "tools": [{"name": "x"}, {}]},
            'c.json: "tools": tool 1: "name" must',
        ),
        ({"a": {"messages": CONTEXT, "tools": [{}]}}, 'c.json: a: "tools": tool 0: "name" must be'),
        ({"messages": CONTEXT, "tools": [TOOL], "tool_choice": "required"}, 'must be "auto", got'),
        (
            [*CONTEXT, *RAIN[:3]],
            "an answer, so that the prompt can follow it, got what a tool gave",
        ),
        (
            [*CONTEXT, *RAIN[:2]],
            "can follow it, got the call of a tool at the end; add the turns up",
        ),
        ({"messages": [*RAIN[:3], *RAIN[4:]]}, "got what a tool gave at the end"),
        ([*CONTEXT, *RAIN[:2], assistant("x")], "c.json: every call must have its result before"),
        ([*CONTEXT, ASKED, GIVEN, assistant("x")], "c.json: message 2 must answer a call"),
        (
            {"messages": [*CONTEXT, assistant("Hi."), ASKED, assistant("x")], "tools": [TOOL]},
            "the turns of a context with tools must begin with a user message",
        ),
    ],
)
def test_contexts_with_tools_that_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(InputError) as refused:
        contexts_of(tmp_path, value)
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'c.json'}: ")


def with_tools(settings: dict, template: str, context: Any, rows: list | None = None) -> dict:
    """Settings of a run with a context of that kind; `rows` are the training prompts."""
    folder = Path(settings["output_dir"]).parent
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer(template).save_pretrained(folder / "model")
    (folder / "context.json").write_text(json.dumps(context), encoding="utf-8")
    if rows:
        write_jsonl(Path(settings["prompts"]), rows)
    return settings | {"model": str(folder / "model"), "context": str(folder / "context.json")}


QWEN, MISTRAL = (TOOL_FAMILIES[name] for name in ("Qwen2.5", "Mistral v0.3"))


def decoded(setup: Setup, ids: list[int]) -> str:
    return setup.tokenizer.decode(ids)


def test_a_task_with_tools(settings: dict) -> None:
    """Prompts, digests and what transformers makes of the same."""
    context = {"messages": CONTEXT, "tools": [TOOL]}
    rows = [{"prompt": "red"}, {"messages": RAIN[:3]}]
    settings = with_tools(settings, QWEN.template, context, rows)
    setup = prepare(TrainConfig(**settings))
    assert setup.remarks == ["context.json: 1 tool: weather"]
    assert decoded(setup, setup.task.a_prefix) == QWEN.shared
    case = setup.task.training[1]
    assert decoded(setup, case.prompt.student_ids) == QWEN.result_alone
    assert decoded(setup, setup.task.prompted_ids(case.prompt)) == QWEN.result_prompted
    looked = rendering(setup, setup.task.training)
    assert (looked.compared, looked.differing) == (2, [])

    without = prepare(TrainConfig(**with_tools(settings, QWEN.template, CONTEXT)))
    changed = TOOL | {"function": TOOL["function"] | {"description": "Of a town."}}
    context = {"messages": CONTEXT, "tools": [changed]}
    other = prepare(TrainConfig(**with_tools(settings, QWEN.template, context)))
    for one in (without, other):
        assert one.task.context_digests != setup.task.context_digests
        assert one.fingerprint != setup.fingerprint
        assert measured_by(one)["form"] != measured_by(setup)["form"]
        assert one.task.train[1].student_ids == case.prompt.student_ids


def test_tools_that_a_template_does_not_write_are_part_of_a_contexts_digest(settings: dict) -> None:
    strict = TOOL | {"function": TOOL["function"] | {"strict": True}}
    digests, prefixes = [], []
    template = TOOL_FAMILIES["DeepSeek V3.1"].template
    for tool in (TOOL, strict):
        context = {"messages": CONTEXT, "tools": [tool]}
        task = prepare(TrainConfig(**with_tools(settings, template, context))).task
        digests.append(task.context_digests)
        prefixes.append(task.prefixes)
    assert prefixes[0] == prefixes[1]
    assert digests[0] != digests[1]


def test_schemas_behind_earlier_turns_are_exact_and_said(settings: dict) -> None:
    context = {"messages": CONTEXT, "tools": [TOOL]}
    rows = [{"prompt": "red"}, {"messages": RAIN}]
    settings = with_tools(settings, MISTRAL.template, context, rows)
    setup = prepare(TrainConfig(**settings, context_placement="user"))
    case = setup.task.training[1]
    assert decoded(setup, setup.task.prompted_ids(case.prompt)) == MISTRAL.asked_prompted
    assert setup.remarks[-1] == (
        "the tools are not shared: the chat template writes their schemas behind where prompts "
        "begin to differ, and they are computed with every sequence"
    )
    alone = prepare(TrainConfig(**with_tools(settings, MISTRAL.template, context, rows[:1])))
    assert "AVAILABLE_TOOLS" in decoded(alone, alone.task.a_prefix)
    assert alone.remarks == ["context.json: 1 tool: weather"]


def test_a_template_without_tools_is_refused_before_weights_are_loaded(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opcd.tasks.prepare.load_model", None)  # it must not be called
    file = Path(settings["output_dir"]).parent / "context.json"
    file.write_text(json.dumps({"messages": CONTEXT, "tools": [TOOL]}), encoding="utf-8")
    settings |= {"context": str(file)}
    name = settings["model"]
    with pytest.raises(
        InputError, match=rf"chat template of '{name}' must write the context's too"
    ):
        prepare(TrainConfig(**settings))
    template = file.with_name("chat.jinja")
    template.write_text(QWEN.template, encoding="utf-8")
    settings |= {"chat_template": str(template)}
    write_jsonl(
        Path(settings["prompts"]), [{"prompt": "red"}, {"messages": RAIN[:2] * 2 + [ASKED]}]
    )
    with pytest.raises(
        InputError, match=r"prompts.jsonl:2: every call must have its result before"
    ):
        prepare(TrainConfig(**settings))


def test_what_the_template_drops_names_its_row(settings: dict) -> None:
    """With the tiny model's own template, which knows no calls."""
    write_jsonl(Path(settings["prompts"]), [{"prompt": "red"}, {"messages": RAIN}])
    with pytest.raises(
        InputError, match=r"prompts.jsonl:2: the chat template .* a call of 'weather'"
    ):
        prepare(TrainConfig(**settings))


def test_calls_as_guided_completions(settings: dict) -> None:
    rows = [{"prompt": "red"}, {"messages": RAIN[:1]}, {"messages": RAIN[:3]}]
    context = {"messages": CONTEXT, "tools": [TOOL]}
    settings = with_tools(settings, QWEN.template, context, rows)
    stored = Path(settings["output_dir"]).parent / "stored.jsonl"
    answers = [assistant("r"), RAIN[1], assistant("Yes.")]
    lines = [
        {"messages": [*row.get("messages", [user("red")]), answer], "tools": [TOOL]}
        for row, answer in zip(rows, answers, strict=True)
    ]
    write_jsonl(stored, lines)
    settings |= {
        "guided_share": 1.0,
        "guided_completions": str(stored),
        "max_completion_tokens": 120,
    }
    setup = prepare(TrainConfig(**settings), for_training=True)
    assert setup.completions is not None
    found = [decoded(setup, setup.completions[p.key][0]) for p in setup.task.train]
    assert found == ["r<|im_end|>", QWEN.call, "Yes.<|im_end|>"]
    write_jsonl(stored, [*lines[:1], lines[1] | {"completion_token_ids": [40, 1]}, *lines[2:]])
    with pytest.raises(InputError, match=r"stored.jsonl:2: a row must have one completion"):
        prepare(TrainConfig(**settings), for_training=True)


def test_special_tokens_in_calls_and_schemas_are_said(settings: dict) -> None:
    spelled = CLOCK | {"function": CLOCK["function"] | {"description": "Of <|im_start|>."}}
    call = {"name": "clock", "arguments": {"zone": "<|im_end|>"}}
    rows = [{"prompt": "red"}, {"messages": [ASKED, calling(tool_calls=[call]), GIVEN]}]
    context = {"messages": CONTEXT, "tools": [spelled]}
    said = prepare(TrainConfig(**with_tools(settings, QWEN.template, context, rows))).remarks
    read_there = "the models read a special token there, not its letters"
    assert said[1:] == [
        f"<|im_end|> is spelled in 1 text, first in prompts.jsonl:2: {read_there}",
        f"<|im_start|> is spelled in 1 text, first in the tools of the context: {read_there}",
    ]


def test_contexts_with_tools_from_python(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path)
    with_one = {"messages": CONTEXT, "tools": [TOOL]}
    assert read_contexts(inputs.context(with_one))[0] == {"": Context(CONTEXT, (TOOL,))}
    file = tmp_path / "bank.json"
    file.write_text(json.dumps(with_one), encoding="utf-8")
    contexts = {"bank": file, "shop": {"messages": [], "tools": [CLOCK]}, "desk": "Be kind."}
    assert read_contexts(inputs.context(contexts))[0] == {
        "bank": Context(CONTEXT, (TOOL,)),
        "shop": Context([], (CLOCK,)),
        "desk": Context([system("Be kind.")]),
    }
    with pytest.raises(InputError, match="context must hold what JSON can hold, got function"):
        inputs.context({"messages": CONTEXT, "tools": [decoded]})


def test_tools_of_one_of_several_contexts(settings: dict) -> None:
    """Rows bring those of their own."""
    contexts = {
        "bank": {"messages": CONTEXT, "tools": [TOOL]},
        "shop": {"messages": CONTEXT, "tools": [CLOCK]},
    }
    for name in ("prompts", "validation_data", "test_data"):
        rows = [json.loads(line) for line in Path(settings[name]).read_text().splitlines()]
        write_jsonl(Path(settings[name]), [row | {"context": "bank"} for row in rows])
    rows = [
        {"prompt": "red", "context": c, "tools": [t]} for c, t in (("bank", TOOL), ("shop", CLOCK))
    ]
    settings = with_tools(settings, QWEN.template, contexts, rows)
    task = prepare(TrainConfig(**settings)).task
    assert len(set(task.context_digests.values())) == 2
    write_jsonl(Path(settings["prompts"]), [rows[0] | {"context": "shop"}])
    with pytest.raises(InputError, match="got weather where the context has clock"):
        read_task_files(TrainConfig(**settings))


def test_canonical_calls() -> None:
    turned: Any = [
        {
            "type": "function",
            "function": {"name": "é", "arguments": {"b": {"d": 1, "c": None}, "a": 1.5}},
        }
    ]
    assert calls_text(turned) == '{"name": "é", "arguments": {"a": 1.5, "b": {"c": null, "d": 1}}}'
