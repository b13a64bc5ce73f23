"""Recorded conversations: what is scored of them, as templates of several families write them."""

from collections.abc import Sequence
from datetime import date

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from opcd.episodes import Episode
from opcd.errors import InputError
from opcd.tasks.chat import Chat
from opcd.tasks.data import Example
from opcd.tasks.messages import Message, assistant, system, unlearned, user
from opcd.tasks.recorded import Recorded, recorded_ids
from opcd.tasks.template import Template
from opcd.tasks.tools import Tool
from tests.conftest import tiny_tokenizer
from tests.opcd.tasks.templates import FAMILIES, TOOL_FAMILIES, byte_tokenizer, tokenizer_of
from tests.opcd.tasks.test_tool_templates import RAIN, TOOL

COLOURS = [user("Hi"), assistant("Hello."), user("Red?"), assistant("r")]
WIND = [*RAIN, assistant("Wind.")]
THOUGHT = "<think>\nHm.\n</think>\n\nHello."
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def chat_of(
    tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool] = (), placement: str = "auto"
) -> Chat:
    template = Template(tokenizer, {}, date(2026, 5, 1))
    return Chat(template, [system("Be brief.")], placement, tools=tools)


def sequences(chat: Chat, messages: Sequence[Message]) -> list[Recorded]:
    *front, turn = messages
    example = Example(tuple(front), (), "p.jsonl:7", "", turn)
    return recorded_ids(chat, example, chat.template.stop_ids)


def recorded(chat: Chat, messages: Sequence[Message]) -> Recorded:
    (found,) = sequences(chat, messages)
    return found


def marked(chat: Chat, messages: Sequence[Message]) -> tuple[str, str]:
    """Both sides of one sequence as text, with brackets around what is scored."""
    return brackets(chat, recorded(chat, messages))


def brackets(chat: Chat, found: Recorded) -> tuple[str, str]:
    decode = chat.template.tokenizer.decode
    sides = []
    for ids, starts in (
        (found.student_ids, [s.student_start for s in found.spans]),
        (found.teacher_ids, [s.teacher_start for s in found.spans]),
    ):
        text, at = "", 0
        for start, span in zip(starts, found.spans, strict=True):
            end = start + span.length
            text += f"{decode(ids[at:start])}⟦{decode(ids[start:end])}⟧"
            at = end
        sides.append(text + decode(ids[at:]))
    return sides[0], sides[1]


def turns(said: str) -> PreTrainedTokenizerBase:
    """ChatML with other assistant turns."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + said
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return byte_tokenizer(template, SPECIAL, "<|im_end|>")


def test_chatml() -> None:
    both = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n⟦r<|im_end|>⟧"
    )
    assert marked(chat_of(tiny_tokenizer()), COLOURS) == (
        both,
        "<|im_start|>system\nBe brief.<|im_end|>\n" + both,
    )


def test_a_conversation_that_the_assistant_begins() -> None:
    """Its greeting answers nothing, and is history."""
    messages = [assistant("Welcome."), *COLOURS[:2]]
    alone, _ = marked(chat_of(tiny_tokenizer()), messages)
    assert alone == (
        "<|im_start|>assistant\nWelcome.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧"
    )


def test_a_turn_of_weight_0_is_history() -> None:
    messages = [COLOURS[0], unlearned(COLOURS[1]), *COLOURS[2:]]
    for text in marked(chat_of(tiny_tokenizer()), messages):
        assert text.endswith(
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
            "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n⟦r<|im_end|>⟧"
        )
        assert text.count("⟦") == 1


def test_a_system_message_of_its_own() -> None:
    alone, prompted = marked(chat_of(tiny_tokenizer()), [system("It is May."), *COLOURS[:2]])
    asked = "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧"
    assert alone == "<|im_start|>system\nIt is May." + asked
    assert prompted == "<|im_start|>system\nBe brief.\n\nIt is May." + asked


def test_llama() -> None:
    """Its turns are trimmed, and it writes a date."""
    front = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 01 May 2026\n\n"
    )
    both = (
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nRed?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦r<|eot_id|>⟧"
    )
    messages = [COLOURS[0], assistant(" Hello.\n"), *COLOURS[2:]]
    found = marked(chat_of(tokenizer_of(FAMILIES["Llama 3.x"])), messages)
    assert found == (front + both, front + "Be brief." + both)


def test_llama_with_calls() -> None:
    both = (
        "Rain in Bonn?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '⟦{"name": "weather", "parameters": {"city": "Bonn", "days": 2}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"rain\\": true}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Wind.<|eot_id|>⟧"
    )
    alone, prompted = marked(chat_of(tokenizer_of(TOOL_FAMILIES["Llama 3.1"]), [TOOL]), WIND)
    assert alone == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n" + both
    )
    assert prompted == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Environment: ipython\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nRespond with JSON for a call.\n\n"
        '{\n    "type": "function",\n    "function": {\n        "name": "weather",\n'
        '        "description": "Of a city.",\n        "parameters": {\n'
        '            "type": "object",\n            "properties": {\n'
        '                "city": {\n                    "type": "string"\n'
        "                }\n            }\n        }\n    }\n}\n\n" + both
    )


def test_qwen_with_calls() -> None:
    both = (
        "<|im_end|>\n<|im_start|>user\nRain in Bonn?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n'
        "</tool_call><|im_end|>⟧\n"
        '<|im_start|>user\n<tool_response>\n{"rain": true}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n⟦Yes.<|im_end|>⟧\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦Wind.<|im_end|>⟧"
    )
    chat = chat_of(tokenizer_of(TOOL_FAMILIES["Qwen2.5"]), [TOOL])
    alone, prompted = marked(chat, WIND)
    assert alone == "<|im_start|>system\nYou are a helper." + both
    assert prompted == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n"
        '{"type": "function", "function": {"name": "weather", "description": "Of a city.", '
        '"parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}\n'
        "</tools>" + both
    )
    ends_in_a_call, _ = marked(chat, WIND[:2])
    assert ends_in_a_call.endswith(
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n'
        "</tool_call><|im_end|>⟧"
    )


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("gpt-oss", "<|start|>assistant⟦<|channel|>final<|message|>Hello.<|return|>⟧"),
        ("Mistral v0.1", " [/INST]⟦Hello.</s>⟧"),
        ("Gemma 3", "<start_of_turn>model\n⟦Hello.<end_of_turn>⟧"),
        ("Phi-3", "<|assistant|>\n⟦Hello.<|end|>⟧"),
    ],
)
def test_what_stands_between_prompt_and_answer_is_scored(family: str, ends: str) -> None:
    for text in marked(chat_of(tokenizer_of(FAMILIES[family])), COLOURS[:2]):
        assert text.endswith(ends)
        assert text.count("⟦") == 1


@pytest.mark.parametrize("family", ["Qwen2.5", "Llama 3.x", "Phi-3", "Granite"])
def test_both_models_are_given_the_same_ids(family: str) -> None:
    """And a turn's are those that stand behind the prompt that it answers."""
    chat = chat_of(tokenizer_of(FAMILIES[family]))
    found = recorded(chat, COLOURS)
    Episode(found.student_ids, found.teacher_ids, tuple(found.spans))  # refuses what differs
    for span, front in zip(found.spans, (1, 3), strict=True):
        for ids, start, prompt in (
            (found.student_ids, span.student_start, chat.student_ids(COLOURS[:front])),
            (found.teacher_ids, span.teacher_start, chat.teacher_ids(COLOURS[:front])),
        ):
            assert ids[:start] == prompt
    first = found.spans[0]
    behind = found.student_ids[first.student_start :]
    assert behind == found.teacher_ids[first.teacher_start :]


def merging() -> PreTrainedTokenizerFast:
    """Of ChatML, with a token for a line break and an H, and one for two dots."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "ĊH", ".."])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "H"), (".", ".")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = tiny_tokenizer().chat_template
    return tokenizer


def test_a_turn_is_tokenized_apart_from_what_it_would_merge_with() -> None:
    tokenizer = merging()
    assert len(tokenizer("\nH..")["input_ids"]) == 2
    chat = chat_of(tokenizer)
    found = recorded(chat, [user("Hm?"), assistant("H.."), user("H"), assistant("o..")])
    first, second = found.spans
    decode = tokenizer.convert_ids_to_tokens
    ids = found.student_ids
    assert decode(ids[: first.student_start])[-1] == "Ċ", "as the prompt is given in the end"
    scored = [ids[s.student_start : s.student_start + s.length] for s in (first, second)]
    assert [decode(x) for x in scored] == [["H", "..", "<|im_end|>"], ["o", "..", "<|im_end|>"]]
    assert "ĊH" in decode(ids[first.student_start + first.length : second.student_start])


@pytest.mark.parametrize(
    ("said", "messages", "spellings"),
    [
        (  # otherwise behind a system message
            "{{ m.content }}{{ '!' if messages[0].role == 'system' }}",
            COLOURS,
            r"the same way with and without it, got .*Hello\.!<.* and .*Hello\.<\|im_end\|>",
        ),
        (
            "{{ m.content.split('</think>')[-1] }}",
            [user("Hi"), assistant(THOUGHT)],
            r"must keep all of a recorded turn, but writes '.*Hello.*' for '<think>\\nHm",
        ),
        (
            "{{ m.content[:4] }}",
            COLOURS[:2],
            "must keep every message, but it drops or alters the assistant message 'Hello.'",
        ),
        (
            "{{ m.content }}",
            [user("Hi"), assistant("So<|im_end|>")],
            r"must end with what ends it, got <\|im_end\|> within 'So<\|im_end\|>'",
        ),
    ],
)
def test_templates_that_write_turns_otherwise(
    said: str, messages: list[Message], spellings: str
) -> None:
    with pytest.raises(InputError, match=f"^p.jsonl:7: .*{spellings}"):
        recorded(chat_of(turns(said)), messages)


@pytest.mark.parametrize(
    ("family", "messages", "spellings"),
    [
        ("DeepSeek-R1", COLOURS[:2], r"got .*Hello.* and .*<think>\\n'"),
        ("DeepSeek-R1", COLOURS, r"got .*Hello.* and .*<think>\\n'"),
        ("Mistral v0.3", COLOURS, r"Hi.* and '<s>\[INST\] Be br.*; set context_placement to user,"),
    ],
)
def test_families_that_write_turns_otherwise(
    family: str, messages: list[Message], spellings: str
) -> None:
    with pytest.raises(InputError, match=f"^p.jsonl:7: .*{spellings}.*set source to sampled"):
        recorded(chat_of(tokenizer_of(FAMILIES[family])), messages)


# In the manner of Qwen3: thoughts of turns in front of the last user message are dropped, and turns
# behind it have one, be it empty.
QWEN3 = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '' %}"
    "{% if loop.index0 > ns.asked %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
DATED = "<|start|>system<|message|>You are a large model.\nCurrent date: 2026-05-01<|end|>"


def by_turns(chat: Chat, messages: Sequence[Message]) -> list[tuple[str, str]]:
    found = sequences(chat, messages)
    for one in found:
        Episode(one.student_ids, one.teacher_ids, tuple(one.spans))  # refuses what differs
    return [brackets(chat, one) for one in found]


def test_qwen3_turn_by_turn() -> None:
    """Each turn with its thought, behind earlier ones without theirs, as the model sees them."""
    chat = chat_of(byte_tokenizer(QWEN3, SPECIAL, "<|im_end|>"))
    context = "<|im_start|>system\nBe brief.<|im_end|>\n"
    first = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nHm.\n</think>\n\nHello.<|im_end|>⟧"
    )
    second = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nr<|im_end|>⟧"
    )
    assert by_turns(chat, [user("Hi"), assistant(THOUGHT), *COLOURS[2:]]) == [
        (first, context + first),
        (second, context + second),
    ]


def test_qwen3_without_thinking_turn_by_turn() -> None:
    """What opens an answer holds the empty thought, which is not scored."""
    template = Template(
        byte_tokenizer(QWEN3, SPECIAL, "<|im_end|>"), {"enable_thinking": False}, date(2026, 5, 1)
    )
    (_, _), (alone, prompted) = by_turns(Chat(template, [system("Be brief.")]), COLOURS)
    assert alone == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nRed?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n⟦r<|im_end|>⟧"
    )
    assert prompted == "<|im_start|>system\nBe brief.<|im_end|>\n" + alone


def test_gpt_oss_turn_by_turn() -> None:
    """The last turn ends with another token than earlier ones."""
    chat = chat_of(tokenizer_of(FAMILIES["gpt-oss"]))
    first = (
        "<|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>Hello.<|return|>⟧"
    )
    second = (
        "<|start|>user<|message|>Hi<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello.<|end|>"
        "<|start|>user<|message|>Red?<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>r<|return|>⟧"
    )
    context = "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
    assert by_turns(chat, COLOURS) == [
        (DATED + first, DATED + context + first),
        (DATED + second, DATED + context + second),
    ]


def test_each_turns_prompt_is_that_of_turns_all() -> None:
    """Thoughts dropped, as a prompt of its own is rendered."""
    chat = chat_of(byte_tokenizer(QWEN3, SPECIAL, "<|im_end|>"))
    messages = [user("Hi"), assistant(THOUGHT), *COLOURS[2:]]
    for one, front in zip(sequences(chat, messages), (1, 3), strict=True):
        (span,) = one.spans
        assert one.student_ids[: span.student_start] == chat.student_ids(messages[:front])
        assert one.teacher_ids[: span.teacher_start] == chat.teacher_ids(messages[:front])


def test_a_thought_that_no_turn_keeps_is_refused() -> None:
    dropping = QWEN3.replace("{{ '<think>\n' + thought + '\n</think>\n\n' }}", "")
    with pytest.raises(InputError, match=r"^p.jsonl:7: .*keep all of a recorded turn.*'<think>"):
        sequences(
            chat_of(byte_tokenizer(dropping, SPECIAL, "<|im_end|>")),
            [user("Hi"), assistant(THOUGHT), *COLOURS[2:]],
        )


def test_the_context_in_the_first_message_stays_there() -> None:
    """Mistral v0.3 drops a system message where an answer follows."""
    chat = chat_of(tokenizer_of(FAMILIES["Mistral v0.3"]), placement="user")
    both = "Hi[/INST]⟦ Hello.</s>⟧[INST] Red?[/INST]⟦ r</s>⟧"
    assert marked(chat, COLOURS) == ("<s>[INST] " + both, "<s>[INST] Be brief.\n\n" + both)


def test_a_turn_that_text_alone_ends() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = chat_of(byte_tokenizer(template, SPECIAL, "<|im_end|>"))
    with pytest.raises(InputError, match=r"that ends a completion \(<\|im_end\|>\), got 'Hello"):
        recorded(chat, COLOURS[:2])
