"""Rendering prompts with and without the context."""

import pytest

from opcd.errors import InputError
from opcd.models.by_name import check_same_tokenizer
from opcd.passes.prefix import shared_prefix_length
from opcd.scoring.reasoning import split_thought
from opcd.tasks.chat import Chat
from opcd.tasks.data import Example
from opcd.tasks.limits import check_lengths
from opcd.tasks.template import Template
from tests.conftest import CHATML, tiny_tokenizer

CONTEXT = [{"role": "system", "content": "Be brief."}]
ANSWER = [{"role": "assistant", "content": "So."}]
PROMPT = [{"role": "user", "content": "Why?"}]


def test_the_teacher_sees_the_context_and_both_see_the_same_end() -> None:
    tokenizer = tiny_tokenizer()
    chat = Chat(Template(tokenizer), CONTEXT)
    student, teacher = chat.student_ids(PROMPT), chat.teacher_ids(PROMPT)
    assert tokenizer.decode(student) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(teacher) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + tokenizer.decode(student)
    )
    assert teacher[-len(student) :] == student


def test_special_tokens_are_not_added_twice() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True
    assert Chat(Template(tokenizer), CONTEXT).student_ids(PROMPT).count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "must have a chat template"),
        (
            "{% if messages[1] %}{{ raise_exception('one message') }}{% endif %}"
            "{% if messages[0]['content'].startswith('Be') %}{{ raise_exception('no') }}{% endif %}"
            + CHATML,
            r"must accept these messages \(system, user\), but says: one message",
        ),
        ("{% set messages = messages[-1:] %}" + CHATML, "drops or alters the system message"),
        (
            CHATML
            + "{% if add_generation_prompt and messages[0]['role'] == 'system' %}<t>{% endif %}",
            "same way with and without",
        ),
        ("{% if 'brief' in messages[0]['content'] %}x{% endif %}", "keep every message"),
        (CHATML.replace("message['content']", "message['content'].upper()"), "drops or alters"),
    ],
)
def test_templates_that_cannot_work(template: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Chat(Template(tiny_tokenizer(template)), CONTEXT, "system")


def test_auto_takes_what_the_template_keeps() -> None:
    last_message_only = "{% set messages = messages[-1:] %}" + CHATML
    chat = Chat(Template(tiny_tokenizer(last_message_only)), CONTEXT)
    assert chat.placement == "user"
    with pytest.raises(InputError, match=r"system message 'Be brief.'; write it in another"):
        Chat(Template(tiny_tokenizer(last_message_only)), [*CONTEXT, *PROMPT, *ANSWER])


def test_a_row_of_several_turns_is_kept_whole() -> None:
    turns = [{"role": "user", "content": "Why?"}, *ANSWER, {"role": "user", "content": "How?"}]
    chat = Chat(Template(tiny_tokenizer("{% set messages = messages[-1:] %}" + CHATML)), CONTEXT)
    two_last = "{% set messages = messages[-3:] %}" + CHATML  # the context goes as turns come
    for render in (
        chat.student_ids,
        chat.teacher_ids,
        Chat(Template(tiny_tokenizer(two_last)), CONTEXT).teacher_ids,
    ):
        with pytest.raises(InputError, match="keep every message, but it drops or alters"):
            render(turns)
    thinking = [turns[0], {"role": "assistant", "content": "<think>Hm.</think>So."}, turns[2]]
    without_thoughts = CHATML.replace(
        "message['content'] +", "message['content'].split('</think>')[-1] +"
    )
    chat = Chat(Template(tiny_tokenizer(without_thoughts)), CONTEXT)
    assert chat.student_ids(thinking) == chat.student_ids(turns)
    assert chat.teacher_ids(thinking) == chat.teacher_ids(turns)


DEMONSTRATIONS = [
    {"role": "user", "content": "Why"},
    {"role": "assistant", "content": "brief"},
]


def test_an_answer_to_several_turns_is_opened_the_same_way() -> None:
    """Also where a request of one turn is."""
    long = "{% if add_generation_prompt and messages[3:] and messages[0].role == 'system' %}"
    chat = Chat(Template(tiny_tokenizer(f"{CHATML}{long}So: {{% endif %}}")), CONTEXT)
    assert chat.teacher_ids(PROMPT)
    with pytest.raises(InputError, match=r"must open the answer the same way .*nSo: ' and .*nt.n'"):
        chat.teacher_ids([*PROMPT, *ANSWER, *PROMPT])


def test_a_dropped_message_is_found_out_though_its_words_stand_elsewhere() -> None:
    """The demonstrations' words are in the system message and in the request."""
    first_and_last = (
        "{% for m in [messages[0], messages[-1]] %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for placement in ("system", "auto"):
        with pytest.raises(InputError, match="drops or alters the user message 'Why'"):
            Chat(Template(tiny_tokenizer(first_and_last)), [*CONTEXT, *DEMONSTRATIONS], placement)


HOISTING = (  # all system messages come first
    "{% for m in messages if m.role == 'system' %}[{{ m.content }}]{% endfor %}"
    "{% for m in messages if m.role != 'system' %}({{ m.content }}){% endfor %}"
)


@pytest.mark.parametrize("own", ["Be brief.", "brief", "Why?"])
def test_a_requests_own_words_may_stand_in_the_context_and_in_the_request(own: str) -> None:
    chat = Chat(Template(tiny_tokenizer()), CONTEXT, own_system=True)
    message = {"role": "system", "content": own}
    text = chat.template.tokenizer.decode(chat.teacher_ids([message, *PROMPT]))
    assert text.startswith(f"<|im_start|>system\nBe brief.\n\n{own}<|im_end|>\n")
    dropping = "{% set first = messages[0] %}" + CHATML.replace(
        "messages %}", "messages if message == first or message.role != 'system' %}"
    )
    for template, wrong in ((dropping, "must keep every message"), (HOISTING, "stand behind")):
        chat = Chat(Template(tiny_tokenizer(template)), DEMONSTRATIONS, "system")
        with pytest.raises(InputError, match=wrong):
            chat.teacher_ids([message, *PROMPT])


def test_auto_puts_the_context_where_requests_keep_their_own_system_message_behind_it() -> None:
    one_in_front = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('only first') }}{% endif %}{% endfor %}"
    )
    context = [*CONTEXT, *DEMONSTRATIONS]
    own = {"role": "system", "content": "Ms Ng asks."}
    for template in (one_in_front + CHATML, HOISTING):
        tokenizer = tiny_tokenizer(template)
        assert Chat(Template(tokenizer), context).placement == "system"
        chat = Chat(Template(tokenizer), context, own_system=True)
        assert chat.placement == "user"
        text = tokenizer.decode(chat.teacher_ids([own, *PROMPT]))
        places = [text.index(w) for w in ("Be brief.\n\nWhy", "Ms Ng asks.\n\nWhy?")]
        assert places == sorted(places)
        with pytest.raises(InputError, match="or set context_placement to user"):
            Chat(Template(tokenizer), context, "system", own_system=True)


def test_template_arguments_reach_the_template() -> None:
    template = CHATML + "{% if think and messages[0]['role'] == 'system' %}<think>{% endif %}"
    chat = Chat(Template(tiny_tokenizer(template), {"think": False}), CONTEXT)
    assert chat.template.tokenizer.decode(chat.teacher_ids(PROMPT)).endswith("assistant\n")


def test_shared_prefix_leaves_every_sequence_a_token() -> None:
    assert shared_prefix_length([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert shared_prefix_length([[1, 2], [1, 2, 3]]) == 1
    assert shared_prefix_length([[7, 8, 9]]) == 2
    assert shared_prefix_length([[1], [2]]) == 0
    assert shared_prefix_length([]) == 0


def test_lengths_are_named_and_nothing_is_cut() -> None:
    examples = [Example((), (), "p.jsonl:1"), Example((), (), "p.jsonl:2")]
    check_lengths(examples, [50, 70], 30, 100, 40)
    with pytest.raises(InputError, match=r"100 positions, got 40 \+ 30 \+ 31 = 101.*p.jsonl:2"):
        check_lengths(examples, [50, 70], 31, 100, 40)


def test_another_tokenizer_is_refused() -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<extra>"])
    check_same_tokenizer(tiny_tokenizer(), tiny_tokenizer())
    with pytest.raises(InputError, match="share one tokenizer"):
        check_same_tokenizer(tiny_tokenizer(), other)


def test_special_tokens_are_kept_where_they_mean_something() -> None:
    """Marks of a thought in the text, all of them in the raw text."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "<call>"]})
    chat = Chat(Template(tokenizer), CONTEXT)
    ids = tokenizer("[THINK]hm, é[/THINK]<call> yes<|im_end|>")["input_ids"]
    assert chat.decode(ids) == "[THINK]hm, é[/THINK] yes"
    assert chat.decode_raw(ids) == "[THINK]hm, é[/THINK]<call> yes<|im_end|>"
    assert chat.decode([]) == ""


@pytest.mark.parametrize(
    ("special", "completion"),
    [
        (
            ["<|START_THINKING|>", "<|END_THINKING|>"],
            "<|START_THINKING|>no?<|END_THINKING|>yes",
        ),
        (["<|channel>", "<channel|>"], "<|channel>thought\nno?<channel|>yes"),
    ],
)
def test_marks_that_are_special_tokens_end_a_thought(special: list[str], completion: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    text = Chat(Template(tokenizer), CONTEXT).decode(tokenizer(completion)["input_ids"])
    assert split_thought(text).answer == "yes"


def test_a_thought_that_the_template_opens_is_seen_as_one() -> None:
    template = CHATML + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    chat = Chat(Template(tiny_tokenizer(template)), CONTEXT)
    assert chat.decode(tiny_tokenizer()("hm")["input_ids"]) == "<think>\nhm"
