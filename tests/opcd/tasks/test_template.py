"""What chat templates of many families make of a request, with and without the context."""

import json
from datetime import date, datetime, timezone

import pytest
from tokenizers.processors import TemplateProcessing

from opcd.errors import InputError
from opcd.tasks.chat import Chat
from opcd.tasks.template import Template, read_template
from tests.opcd.tasks.templates import FAMILIES, Family, byte_tokenizer, tokenizer_of

CONTEXT = [{"role": "system", "content": "Be brief."}]
REQUEST = [{"role": "user", "content": "Why?"}]
DAY = date(2026, 5, 1)
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


def template_of(family: Family, day: date = DAY) -> Template:
    return Template(tokenizer_of(family), family.arguments, day)


@families
@pytest.mark.parametrize("placement", ["auto", "system", "user"])
def test_both_sides_of_a_request(family: Family, placement: str) -> None:
    template = template_of(family)
    encode = template.tokenizer.backend_tokenizer.encode
    if placement == "system" and family.system is None:
        with pytest.raises(InputError, match="set context_placement to user"):
            Chat(template, CONTEXT, placement)
        return
    chat = Chat(template, CONTEXT, placement)
    in_user = placement == "user" or family.system is None
    assert chat.placement == ("user" if in_user else "system")
    expected = family.user if in_user else family.system
    assert template.text(chat.student_messages(REQUEST)) == family.alone
    assert template.text(chat.teacher_messages(REQUEST)) == expected
    assert chat.student_ids(REQUEST) == encode(family.alone, add_special_tokens=False).ids
    assert chat.teacher_ids(REQUEST) == encode(expected, add_special_tokens=False).ids


@families
def test_what_ends_an_answer_ends_a_completion(family: Family) -> None:
    template = template_of(family)
    ends = template.tokenizer.convert_tokens_to_ids(family.ends)
    assert template.frame.end == ends
    assert set(template.stop_ids) == {ends, template.tokenizer.convert_tokens_to_ids(family.eos)}


@families
def test_a_date_is_found_by_what_is_written(family: Family) -> None:
    chat = Chat(template_of(family), CONTEXT)
    assert chat.dated == any(
        "2026" in text for text in (family.alone, family.system or family.user)
    )
    later = template_of(family, date(2027, 11, 12))
    if chat.dated:
        written = later.text(REQUEST) + later.text(chat.teacher_messages(REQUEST))
        assert "2027" in written
        assert "2026" not in written


def test_a_date_given_by_the_user_is_no_clock() -> None:
    template = "{{ date_string or strftime_now('%-d %b %y') }} " + FAMILIES["Phi-3"].template
    tokenizer = tokenizer_of(FAMILIES["Phi-3"]._replace(template=template))
    assert not Chat(Template(tokenizer, {"date_string": "1 May"}, DAY), CONTEXT).dated
    assert Template(tokenizer, {}, DAY).text(REQUEST).startswith("1 May 26 <|user|>")


@families
@pytest.mark.parametrize("placement", ["system", "user"])
def test_demonstrations_stand_between_context_and_request(family: Family, placement: str) -> None:
    if placement == "system" and family.system is None:
        return
    shown = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    chat = Chat(template_of(family), [*CONTEXT, *shown], placement)
    text = chat.template.text(chat.teacher_messages(REQUEST))
    order = ["Be brief.", "How?", "So.", "Why?"]
    if family is FAMILIES["Mistral v0.3"] and placement == "system":
        order = ["How?", "So.", "Be brief.", "Why?"]  # this family puts it into the last turn
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_without_context_an_empty_or_another_system_message() -> None:
    qwen = template_of(FAMILIES["Qwen2.5"])
    turns = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    none = Chat(qwen, CONTEXT, without_context="none")
    assert qwen.text(none.student_messages(REQUEST)) == ("<|im_start|>system\n<|im_end|>\n" + turns)
    ada = Chat(qwen, CONTEXT, without_context="You are Ada.")
    assert ada.stand_in == "<|im_start|>system\nYou are Ada.<|im_end|>\n<|im_start|>user\n"
    assert "Ada" not in qwen.text(ada.teacher_messages(REQUEST))


def test_without_context_where_there_is_no_system_role() -> None:
    gemma = template_of(FAMILIES["Gemma 1 and 2"])
    none = Chat(gemma, CONTEXT, without_context="none")
    assert gemma.text(none.student_messages(REQUEST)) == FAMILIES["Gemma 1 and 2"].alone
    ada = Chat(gemma, CONTEXT, without_context="You are Ada.")
    assert ada.stand_in == "<bos><start_of_turn>user\nYou are Ada.\n\n"


OWN = {"role": "system", "content": "The customer is Ms Ng."}


@pytest.mark.parametrize(
    ("name", "context", "student", "teacher"),
    [
        (
            "ChatML base model",
            CONTEXT,
            "<|im_start|>system\nThe customer is Ms Ng.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            "<|im_start|>system\nBe brief.\n\nThe customer is Ms Ng.<|im_end|>\n"
            "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "Gemma 1 and 2",
            CONTEXT,
            "<bos><start_of_turn>user\nThe customer is Ms Ng.\n\nWhy?<end_of_turn>\n"
            "<start_of_turn>model\n",
            "<bos><start_of_turn>user\nBe brief.\n\nThe customer is Ms Ng.\n\nWhy?<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
        (
            "Phi-4-mini",
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "<|system|>The customer is Ms Ng.<|end|><|user|>Why?<|end|><|assistant|>",
            "<|user|>Hi<|end|><|assistant|>Hello<|end|><|system|>The customer is Ms Ng.<|end|>"
            "<|user|>Why?<|end|><|assistant|>",
        ),
    ],
)
def test_a_requests_own_system_message_stays_behind_the_context(
    name: str, context: list, student: str, teacher: str
) -> None:
    chat = Chat(template_of(FAMILIES[name]), context)
    decode = chat.template.tokenizer.decode
    assert decode(chat.student_ids([OWN, *REQUEST])) == student
    assert decode(chat.teacher_ids([OWN, *REQUEST])) == teacher


@pytest.mark.parametrize("mistake", ["1 / 0", "'a' + 1", "2.0 ** 9999", "[][3].x", "none()"])
def test_a_template_that_fails_is_refused(mistake: str) -> None:
    template = "{% for m in messages %}{{ " + mistake + " }}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match=r"must accept these messages \(user\), but says: "):
        Template(byte_tokenizer(template, ["</s>"], "</s>"), {}, DAY)


def test_a_requests_own_system_message_that_the_template_hoists_is_refused() -> None:
    hoisting = (
        "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content }}]{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role != 'system' %}({{ m.content }}){% endif %}{% endfor %}"
    )
    template = Template(byte_tokenizer(hoisting, ["</s>"], "</s>"), {}, DAY)
    context = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(InputError, match=r"behind the context.*put it into the user's message"):
        Chat(template, context).teacher_ids([OWN, *REQUEST])


def test_reasoning_in_a_demonstration() -> None:
    thought = "<think>Hm.</think>So."
    shown = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": thought}]
    for name in ("Qwen3, without thinking", "DeepSeek-R1"):
        with pytest.raises(InputError, match="write that answer without its reasoning"):
            Chat(template_of(FAMILIES[name]), [*CONTEXT, *shown])


def test_a_template_from_a_file(tmp_path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(FAMILIES["Phi-3"].template, encoding="utf-8")
    assert read_template(str(file)) == FAMILIES["Phi-3"].template
    file.write_text("{% for m in messages %}", encoding="utf-8")
    with pytest.raises(InputError, match="must be a Jinja file"):
        read_template(str(file))
    with pytest.raises(InputError, match="not there"):
        read_template(str(tmp_path / "none.jinja"))
    for broken in ("{% for m in messages %}{% generation %}", "{{ messages | no_such_filter }"):
        file.write_text(broken, encoding="utf-8")
        with pytest.raises(InputError, match="must be a Jinja file"):
            read_template(str(file))
    for tag in ("{% generation %}{{ m }}{%- endgeneration -%}", "{% continue %}"):
        file.write_text("{% for m in messages %}" + tag + "{% endfor %}", encoding="utf-8")
        assert "messages" in read_template(str(file))
    file.write_text(FAMILIES["Phi-3"].template, encoding="utf-8-sig")
    assert read_template(str(file)) == FAMILIES["Phi-3"].template, "a byte order mark"
    for text, message in (
        ("hello", "without that word"),
        ('{"eos_token": "</s>"}', 'with its text as "chat_template", got .*, JSON without'),
        ('[{"name": "default", "template": "{{ messages }}"}]', "JSON without"),
        ('{"chat_template": "{% for m in messages %}"}', "must be a Jinja file"),
        (" ", "must not be empty"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_template(str(file))
    config = {"eos_token": "<|end|>", "chat_template": FAMILIES["Phi-3"].template}
    file.write_text(json.dumps(config), encoding="utf-8")
    assert read_template(str(file)) == FAMILIES["Phi-3"].template, "a tokenizer_config.json"


def test_a_completion_as_text_is_tokenized_behind_its_request() -> None:
    family = FAMILIES["ChatML base model"]
    tokenizer = byte_tokenizer(family.template, family.special, family.eos, prefix_space=True)
    chat = Chat(Template(tokenizer, {}, DAY), CONTEXT)
    assert tokenizer.decode(tokenizer("So.", add_special_tokens=False)["input_ids"]) == " So."
    ids = chat.completion_ids(REQUEST, "So.")
    assert tokenizer.decode(ids) == "So.<|im_end|>"
    assert tokenizer.decode(chat.student_ids(REQUEST) + ids).endswith("assistant\nSo.<|im_end|>")


def test_several_templates_without_a_default() -> None:
    tokenizer = tokenizer_of(FAMILIES["Phi-3"])
    tokenizer.chat_template = {"rag": "{{ messages }}", "tool_use": "{{ messages }}"}
    with pytest.raises(
        InputError, match=r"named default, got rag, tool_use; .*name that as chat_template"
    ):
        Template(tokenizer)


@pytest.mark.parametrize("code", "aAbBcCdDeFgGhHIjmMnpPrRSTuUVwWxXyYzZfs%")
def test_codes_of_dates(code: str) -> None:
    """As strftime writes them at midnight UTC, where it has them."""
    family = FAMILIES["Phi-3"]
    shown = f"{{{{ strftime_now('<%{code}|%%{code}>') }}}} " + family.template
    template = Template(tokenizer_of(family._replace(template=shown)), {}, DAY)
    written = template.text(REQUEST).partition("<")[2].partition(">")[0]
    midnight = datetime(DAY.year, DAY.month, DAY.day, tzinfo=timezone.utc)
    expected = datetime(DAY.year, DAY.month, DAY.day).strftime(f"%{code}")
    if code == "s":
        expected = str(int(midnight.timestamp()))
    if code != "n":  # white space at the start may be trimmed
        assert written == f"{expected}|%{code}"


@families
def test_a_tokenizer_that_prepends_bos_does_not_double_the_templates(family: Family) -> None:
    template = template_of(family)
    bos = template.tokenizer.convert_tokens_to_ids(family.special[0])
    template.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{family.special[0]} $A", special_tokens=[(family.special[0], bos)]
    )
    assert template.tokenizer("x")["input_ids"][0] == bos
    chat = Chat(template, CONTEXT)
    for ids, text in (
        (chat.student_ids(REQUEST), family.alone),
        (chat.teacher_ids(REQUEST), family.system or family.user),
    ):
        assert ids.count(bos) == text.count(family.special[0])
