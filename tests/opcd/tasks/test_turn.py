"""Completions given as text, as chat templates of many families write answered turns."""

from datetime import date

import pytest

from opcd.errors import InputError
from opcd.tasks.chat import Chat
from opcd.tasks.template import Template
from tests.opcd.tasks.templates import CHATML_TURNS, FAMILIES, Family, tokenizer_of

CONTEXT = [{"role": "system", "content": "Be brief."}]
REQUEST = [{"role": "user", "content": "Why?"}]
CHATML = FAMILIES["ChatML base model"]


def turns(said: str, opens: str, special: str, eos: str) -> Family:
    """A family of which only what stands around an answer matters here."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + said + "{% else %}"
        "<s>{{ m.role }} {{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + opens + "{% endif %}"
    )
    return CHATML._replace(template=template, special=("<s>", *special.split()), eos=eos)


OTHERS = {
    "Qwen3": turns(
        "<s>assistant {% if '</think>' in m.content %}{{ m.content }}{% else %}"
        "{{ '<think>\n\n</think>\n\n' + m.content }}{% endif %}</s>",
        "<s>assistant ",
        "</s>",
        "</s>",
    ),
    "a trimming Qwen3": turns(
        "<s>assistant {{ '<think>\n\n</think>\n\n' + m.content.split('</think>')[-1] | trim }}</s>",
        "<s>assistant ",
        "</s>",
        "</s>",
    ),
    "a thinking Qwen3": turns(
        "<s>assistant {{ '<think>\n\n</think>\n\n' + m.content }}</s>",
        "<s>assistant <think>\n",
        "</s>",
        "</s>",
    ),
    "Cohere": turns(
        "<turn><bot><response>{{ m.content }}</response></turn>",
        "<turn><bot>",
        "</s> <turn> <bot> <response> </response> </turn>",
        "</turn>",
    ),
    "Llama 2": turns(" {{ m.content }} </s>", "", "</s>", "</s>"),
    "spaces behind the prompt": turns("<s>bot {{ m.content }}</s>", "<s>bot  ", "</s>", "</s>"),
    "another opening": turns("<s>model {{ m.content }}</s>", "<s>assistant ", "</s>", "</s>"),
    "no answer": turns("{{ raise_exception('no answer') }}", "<s>bot ", "</s>", "</s>"),
    "the last message alone": CHATML._replace(
        template="{% set messages = messages[-1:] %}" + CHATML.template
    ),
}
THOUGHT = "<think>\nHm.\n</think>\n\nSo."
CHANNELS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"


def chat_of(name: str) -> Chat:
    family = (FAMILIES | OTHERS)[name]
    return Chat(Template(tokenizer_of(family), family.arguments, date(2026, 5, 1)), CONTEXT)


@pytest.mark.parametrize(
    ("family", "text", "completion"),
    [
        ("ChatML base model", "So.", "So.<|im_end|>"),
        ("ChatML base model", "So.<|im_end|>\n<|endoftext|>\n", "So.<|im_end|>"),
        ("ChatML base model", THOUGHT, THOUGHT + "<|im_end|>"),
        ("ChatML base model", "<think></think>So.", "<think></think>So.<|im_end|>"),
        ("gpt-oss", "So.", "<|channel|>final<|message|>So.<|return|>"),
        ("gpt-oss", "<|channel|>final<|message|>So.", "<|channel|>final<|message|>So.<|return|>"),
        ("gpt-oss", CHANNELS + "So.<|return|>", CHANNELS + "So.<|return|>"),
        ("DeepSeek-R1", "Hm.\n</think>\n\nSo.", "Hm.\n</think>\n\nSo.<｜end｜>"),
        ("DeepSeek-R1", THOUGHT, "Hm.\n</think>\n\nSo.<｜end｜>"),
        ("a thinking Qwen3", THOUGHT, "Hm.\n</think>\n\nSo.</s>"),
        ("Qwen3, without thinking", "So.", "So.<|im_end|>"),
        ("Qwen3, without thinking", "<think>\n\n</think>\n\nSo.", "So.<|im_end|>"),
        ("Qwen3", "So.", "<think>\n\n</think>\n\nSo.</s>"),
        ("Qwen3", "<think></think>So.", "<think>\n\n</think>\n\nSo.</s>"),
        ("Qwen3", THOUGHT, THOUGHT + "</s>"),
        ("Mistral v0.3", "So.", " So.</s>"),
        ("Mistral v0.3", " So.</s>", " So.</s>"),
        ("Llama 2", "So.", " So. </s>"),
        ("ChatML base model", " So.\n", " So.\n<|im_end|>"),
        ("Llama 3.x", " So.\n", "So.<|eot_id|>"),
        ("Llama 3.x", THOUGHT + "\n", THOUGHT + "<|eot_id|>"),
        ("Gemma 3", "So.\n\n<end_of_turn>", "So.<end_of_turn>"),
        ("a trimming Qwen3", THOUGHT + "\n", THOUGHT + "</s>"),
        ("a trimming Qwen3", "So.\n", "<think>\n\n</think>\n\nSo.</s>"),
        ("a thinking Qwen3", "<think>\n\n</think>\n\nSo.", "\n</think>\n\nSo.</s>"),
        ("a thinking Qwen3", "<think>Hm.</think>So.", "Hm.</think>So.</s>"),
        ("spaces behind the prompt", "So.", "So.</s>"),
        ("Cohere", "So.", "<response>So.</response>"),
        ("Cohere", "<response>So.</response></turn>", "<response>So.</response>"),
    ],
)
def test_what_a_template_writes_around_an_answer_stands_there_once(
    family: str, text: str, completion: str
) -> None:
    chat = chat_of(family)
    assert chat.decode_raw(chat.completion_ids(REQUEST, text)) == completion


@pytest.mark.parametrize("name", (FAMILIES | OTHERS).keys())
def test_a_completion_is_the_answered_conversation(name: str) -> None:
    """Wherever that begins with the prompt."""
    chat = chat_of(name)
    opened = chat.template.text(REQUEST)
    try:
        answered = [*REQUEST, {"role": "assistant", "content": "So."}]
        whole = chat.template.text(answered, answered=True)
    except InputError:
        whole = ""
    if not whole.startswith(opened) or opened.endswith("<think>\n"):
        return
    completion = chat.decode_raw(chat.completion_ids(REQUEST, "So."))
    assert whole.startswith(opened + completion)
    assert completion.endswith(
        str(chat.template.tokenizer.convert_ids_to_tokens(chat.template.stop_ids[-1]))
    )


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("DeepSeek-R1", "So.", r"must end the thought .* \(<think>\) and then answer, got 'So\.'"),
        ("DeepSeek-R1", "<think>\nSo.", "must end the thought"),
        ("DeepSeek-R1", "Hm.</think>\n", "must end the thought"),
        ("a thinking Qwen3", "So.", "often enable_thinking=false"),
        ("Qwen3, without thinking", THOUGHT, r"got the thought '<think>\\nHm\.\\n</think>\\n\\n'"),
        (
            "another opening",
            "So.",
            "opens with '</s><s>assistant ' and writes an",
        ),
        ("no answer", "So.", "pass completion_token_ids"),
        ("ChatML base model", "<|im_end|>\n", "must hold an answer, got what ends it alone"),
        ("the last message alone", "So.", "pass completion_token_ids"),
    ],
)
def test_texts_that_a_template_has_no_place_for(family: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chat_of(family).completion_ids(REQUEST, text)


def test_the_end_of_an_answer_is_found_where_the_request_is_not_written() -> None:
    chat = chat_of("the last message alone")
    assert chat.template.stop_ids == [
        chat.template.tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")
    ]
    dropping = CHATML._replace(
        template=CHATML_TURNS.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' }}")
    )
    assert Template(tokenizer_of(dropping)).frame.end is None
