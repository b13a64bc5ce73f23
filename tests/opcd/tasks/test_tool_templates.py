"""What chat templates of four families make of tools: schemas, calls, results."""

from collections.abc import Sequence
from datetime import date

import pytest

from opcd.errors import InputError
from opcd.passes.prefix import shared_prefix_length
from opcd.tasks.chat import Chat
from opcd.tasks.messages import Message, assistant, system, user
from opcd.tasks.template import Template
from opcd.tasks.tools import Tool, ToolCall
from tests.opcd.tasks.templates import (
    CHATML_TURNS,
    FAMILIES,
    TOOL_FAMILIES,
    ToolFamily,
    byte_tokenizer,
    tokenizer_of,
)

CONTEXT = [system("Be brief.")]
TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK: Tool = {"type": "function", "function": {"name": "clock", "description": "The time."}}
CALL: ToolCall = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Bonn", "days": 2}},
    "id": "a1b2c3d4e",
}
GIVEN: Message = {"role": "tool", "content": '{"rain": true}', "tool_call_id": "a1b2c3d4e"}
RAIN = [user("Rain in Bonn?"), assistant("", [CALL]), GIVEN, assistant("Yes."), user("Why?")]
families = pytest.mark.parametrize("family", TOOL_FAMILIES.values(), ids=TOOL_FAMILIES.keys())


def chat_of(family: ToolFamily, tools: Sequence[Tool] = (TOOL,), placement: str = "") -> Chat:
    template = Template(tokenizer_of(family), {}, date(2026, 5, 1))
    return Chat(template, CONTEXT, placement or family.placement, tools=tools)


def with_template(template: str, tools: Sequence[Tool] = (TOOL,)) -> Chat:
    tokenizer = byte_tokenizer(template, ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    return Chat(Template(tokenizer, {}, date(2026, 5, 1)), CONTEXT, "system", tools=tools)


@families
def test_both_sides_of_a_conversation_with_tools(family: ToolFamily) -> None:
    chat = chat_of(family)
    encode = chat.template.tokenizer.backend_tokenizer.encode
    for messages, alone, prompted in (
        (RAIN, family.asked_alone, family.asked_prompted),
        (RAIN[:3], family.result_alone, family.result_prompted),
    ):
        assert chat.template.text(chat.student_messages(messages)) == alone
        assert chat.template.text(chat.teacher_messages(messages), tools=[TOOL]) == prompted
        assert chat.student_ids(messages) == encode(alone, add_special_tokens=False).ids
        assert chat.teacher_ids(messages) == encode(prompted, add_special_tokens=False).ids


@families
def test_what_all_prompts_share_holds_the_schemas(family: ToolFamily) -> None:
    """But where a template writes them behind earlier turns."""
    chat = chat_of(family)
    requests = [RAIN, RAIN[:3], [user("Hm?")], [user("3 + 4")]]
    ids = [chat.teacher_ids(messages) for messages in requests]
    prefix = ids[0][: shared_prefix_length(ids)]
    assert chat.template.tokenizer.decode(prefix) == family.shared
    for messages in requests:
        assert chat.holds_tools(prefix, messages) == ("weather" in family.shared)


@families
def test_a_turn_that_calls_as_a_completion(family: ToolFamily) -> None:
    chat = chat_of(family)
    ids = chat.call_ids(RAIN[:1], RAIN[1], chat.template.stop_ids)
    assert chat.template.tokenizer.decode(ids) == family.call
    whole = chat.template.text([*chat.student_messages(RAIN[:2])], answered=True)
    assert whole.startswith(chat.template.text(RAIN[:1]) + family.call)


@families
def test_several_calls_and_what_they_gave(family: ToolFamily) -> None:
    second: ToolCall = {
        "type": "function",
        "function": {"name": "clock", "arguments": {"zone": 'a "b" \u00e9', "at": [1.5, None]}},
        "id": "f6g7h8i9j",
    }
    more: Message = {"role": "tool", "content": "12:00", "tool_call_id": "f6g7h8i9j"}
    messages = [RAIN[0], assistant("", [CALL, second]), GIVEN, more]
    chat = chat_of(
        family, [TOOL, CLOCK] if family is not TOOL_FAMILIES["DeepSeek V3.1"] else [TOOL]
    )
    if family is TOOL_FAMILIES["Llama 3.1"]:
        with pytest.raises(
            InputError, match=r"says: single tool-calls only; name a file with anot"
        ):
            chat.student_ids(messages)
        return
    decode = chat.template.tokenizer.decode
    for text in (decode(chat.student_ids(messages)), decode(chat.teacher_ids(messages))):
        places = [text.index(w) for w in ('"Bonn"', 'a \\"b\\" \u00e9', '"rain"', "12:00")]
        assert places == sorted(places)


def test_a_context_shows_calls() -> None:
    """As demonstrations in front of the request."""
    family = TOOL_FAMILIES["Qwen2.5"]
    template = Template(tokenizer_of(family), {}, date(2026, 5, 1))
    chat = Chat(template, [*CONTEXT, *RAIN[:4]], tools=[TOOL])
    assert chat.template.tokenizer.decode(chat.teacher_ids(RAIN[4:])) == family.asked_prompted


def test_the_context_is_kept_with_the_other_placement() -> None:
    """Of this family the system message stands in the last turn, if that is the user's."""
    chat = chat_of(TOOL_FAMILIES["Mistral v0.3"], placement="system")
    chat.teacher_ids(RAIN)
    with pytest.raises(
        InputError,
        match=r"every message beside the tools, but it drops or alters the system message 'Be "
        r"brief.'; write it in another role, .* as chat_template; or set context_placement to user",
    ):
        chat.teacher_ids(RAIN[:3])


def test_a_template_of_several_is_for_tools() -> None:
    family = TOOL_FAMILIES["Qwen2.5"]
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = {"default": CHATML_TURNS, "tool_use": family.template}
    chat = Chat(Template(tokenizer), CONTEXT, tools=[TOOL])
    request = [user("Why?")]
    assert tokenizer.decode(chat.student_ids(request)) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(chat.teacher_ids(request)) == (
        family.shared + "Why?<|im_end|>\n<|im_start|>assistant\n"
    )


IN_FRONT = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLS = "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
FORECAST = TOOL | {
    "function": TOOL["function"]
    | {"parameters": {"type": "object", "properties": {"city": {}, "days": {"type": "integer"}}}}
}
WITH_CALLS = IN_FRONT + CHATML_TURNS.replace("{{ m.content }}", "{{ m.content }}" + CALLS)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            CHATML_TURNS,
            "must write the context's tools, but its text is the same without them; name a file "
            "with another template as chat_template, or describe the tools in the system message",
        ),
        (
            "{% if tools %}{{ tools[:1] | tojson }}{% endif %}" + CHATML_TURNS,
            "must write the context's tools, but it drops clock; name a file",
        ),
        (
            "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}"
            "{% endfor %}" + CHATML_TURNS.replace("{{ m.content }}", "{{ m.content | trim }}"),
            "must write the context's tools, but it drops days of weather; name a file",
        ),
        (
            "{% if tools %}{{ tools | tojson }}{% set messages = messages[1:] %}{% endif %}"
            "{% if messages %}" + CHATML_TURNS + "{% endif %}",
            "must keep every message beside the tools, but it drops or alters the system message "
            "'Be brief.'",
        ),
        (
            "{% if tools %}{{ tools | tojson }}{% if messages[1] %}"
            "{% set messages = messages[:1] %}{% endif %}{% endif %}" + CHATML_TURNS,
            "must keep the request behind the context and its tools as it is, but drops or alters",
        ),
        (
            CHATML_TURNS.replace(
                "{% if add", "{% if tools %}{{ tools | tojson }}{% endif %}{% if add"
            ),
            "must open the answer the same way .* a template that writes the tools in front of the "
            "request",
        ),
        (
            IN_FRONT + "{% if tools %}{{ tools[0].nothing.x }}{% endif %}" + CHATML_TURNS,
            r"must accept these messages \(user; tools weather, clock\), but says: ",
        ),
    ],
)
def test_templates_that_drop_tools_or_messages_for_them(template: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_template(template, [FORECAST, CLOCK])


def test_names_that_are_not_in_ascii_are_kept() -> None:
    given = {"type": "object", "properties": {"größe": {"type": "string"}}}
    tool = TOOL | {"function": TOOL["function"] | {"name": "größe", "parameters": given}}
    for form in ("tojson", "string", "tojson(ensure_ascii=true)"):
        with_template(WITH_CALLS.replace("tools | tojson", f"tools | {form}"), [tool])


@pytest.mark.parametrize(
    ("template", "lost"),
    [
        (IN_FRONT + CHATML_TURNS, "a call of 'weather'"),
        (WITH_CALLS.replace("m.tool_calls or []", "[]"), "a call of 'weather'"),
        (WITH_CALLS.replace("call.function | tojson", "call.function.name"), "'Bonn' in a call of"),
        (
            WITH_CALLS.replace("| tojson }}{% endfor", "| string | truncate(60) }}{% endfor"),
            "'Bonn' in a call of 'weather'",
        ),
        (
            WITH_CALLS.replace(
                "call.function | tojson",
                "call.function.name }}(city: {{ call.function.arguments.city }}, days: {{ 2",
            ),
            "2 in a call of 'weather'",
        ),
        (
            WITH_CALLS.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"),
            "the tool message '{\"rain\": true}'",
        ),
        (
            WITH_CALLS.replace("{{ m.content }}", "{{ m.content | replace('{\"', '{') }}"),
            "the tool message '{\"rain\": true}'",
        ),
        (
            WITH_CALLS.replace(
                "messages %}", "messages if m.tool_calls or m.role != 'assistant' %}"
            ),
            "the assistant message 'Yes.'",
        ),
    ],
)
def test_templates_that_drop_some_of_a_conversation(template: str, lost: str) -> None:
    """Each for the student; the words of the call stand in the question, too."""
    asked = [user("weather, city, Bonn, 2, rain: true, Yes."), *RAIN[1:]]
    with pytest.raises(InputError) as refused:
        with_template(template).student_ids(asked)
    assert f"but it drops or alters {lost}" in str(refused.value)
    with_template(WITH_CALLS).student_ids(asked)


def test_a_text_beside_calls() -> None:
    messages = [RAIN[0], assistant("Let me see.", [CALL]), GIVEN]
    qwen, llama = (chat_of(TOOL_FAMILIES[name]) for name in ("Qwen2.5", "Llama 3.1"))
    assert "assistant\nLet me see.\n<tool_call>" in qwen.template.tokenizer.decode(
        qwen.student_ids(messages)
    )
    with pytest.raises(
        InputError, match=r"alters the assistant message 'Let me see\.'; leave out w"
    ):
        llama.student_ids(messages)
    thinking = [RAIN[0], assistant("<think>Hm.</think>", [CALL]), GIVEN]
    without = family_without_thoughts()
    assert without.student_ids(thinking) == without.student_ids(RAIN[:3])


def family_without_thoughts() -> Chat:
    return with_template(
        WITH_CALLS.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    )


@families
def test_a_request_behind_tools_begins_with_the_user(family: ToolFamily) -> None:
    """Llama 3.1's template would write the greeting into a user message."""
    greeted = [assistant("Hello."), user("Why?")]
    with pytest.raises(InputError, match="must begin with a user message, in which some chat temp"):
        chat_of(family).teacher_ids(greeted)
    chat_of(family, ()).teacher_ids(greeted)


def test_an_answer_behind_a_result() -> None:
    """A text stands there as the template opens it."""
    for name, completion in (("Qwen2.5", "Yes.<|im_end|>"), ("Mistral v0.3", " Yes.</s>")):
        chat = chat_of(TOOL_FAMILIES[name])
        assert chat.decode_raw(chat.completion_ids(RAIN[:3], "Yes.")) == completion
    with pytest.raises(
        InputError, match=r"that of '' opens with '' and '<｜Assistant｜></think>'; pa"
    ):
        chat_of(TOOL_FAMILIES["DeepSeek V3.1"]).completion_ids(RAIN[:3], "Yes.")
    thinking = with_template(
        WITH_CALLS.removesuffix("{% endif %}") + "{% if messages[-1].role == 'user' %}<think>"
        "{% endif %}{% endif %}"
    )
    thinking.student_ids(RAIN)
    with pytest.raises(InputError, match="must open a thought behind what a tool gave as it does"):
        thinking.student_ids(RAIN[:3])


def test_the_answer_to_a_result_is_opened_alike_for_both_models() -> None:
    otherwise = with_template(
        WITH_CALLS + "{% if tools and messages[-1].role == 'tool' %}So: {% endif %}"
    )
    otherwise.teacher_ids(RAIN)
    with pytest.raises(
        InputError, match=r"must open the answer the same way .*assistant.nSo: ' and"
    ):
        otherwise.teacher_ids(RAIN[:3])


def test_a_text_beside_calls_that_is_written_behind_their_results() -> None:
    """As Gemma 4's template does."""
    moving = with_template(
        WITH_CALLS.replace(
            "{{ m.content }}",
            "{{ m.content if not m.tool_calls }}"
            "{{ messages[loop.index0 - 1].content if m.role == 'tool' }}",
        )
    )
    messages = [RAIN[0], assistant("Let me see.", [CALL]), GIVEN]
    text = moving.template.tokenizer.decode(moving.teacher_ids(messages))
    assert text.endswith('{"rain": true}Let me see.<|im_end|>\n<|im_start|>assistant\n')


def test_calls_that_a_template_writes_elsewhere_or_without_an_end() -> None:
    turn, asked = RAIN[1], RAIN[:1]
    elsewhere = with_template(
        IN_FRONT
        + "{% for m in messages %}{% if m.tool_calls %}<|im_start|>calls\n"
        + CALLS
        + "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(InputError, match="writes them otherwise; pass completion_token_ids"):
        elsewhere.call_ids(asked, turn, elsewhere.template.stop_ids)
    endless = with_template(
        WITH_CALLS.replace("<|im_end|>", "{{ '<|im_end|>' if not m.tool_calls }}")
    )
    with pytest.raises(
        InputError, match=r"must end a turn of calls with a token that ends a compl"
    ):
        endless.call_ids(asked, turn, endless.template.stop_ids)
    other = with_template(
        WITH_CALLS.replace(
            "{{ call.function", "{% if tools %}with tools: {% endif %}{{ call.function"
        )
    )
    with pytest.raises(InputError, match="must write calls the same way with and without"):
        other.call_ids(asked, turn, other.template.stop_ids)
    chat = with_template(WITH_CALLS)
    spelled = assistant("See <|im_end|>", [CALL])
    with pytest.raises(InputError, match=r"must end with what ends it, got <\|im_end\|> within it"):
        chat.call_ids(asked, spelled, chat.template.stop_ids)


def test_tools_of_the_context_and_of_the_arguments() -> None:
    family = TOOL_FAMILIES["Qwen2.5"]
    template = Template(tokenizer_of(family), {"tools": [CLOCK]})
    assert "clock" in template.text(RAIN[:1])
    with pytest.raises(InputError, match="tools must stand in one place, got some in the context"):
        Chat(template, CONTEXT, tools=[TOOL])


def test_families_that_know_no_tools_are_refused() -> None:
    for family in FAMILIES.values():
        template = Template(tokenizer_of(family), family.arguments, date(2026, 5, 1))
        with pytest.raises(InputError, match="must write the context's tools"):
            Chat(template, CONTEXT, tools=[TOOL])
