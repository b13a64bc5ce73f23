"""A completion that was given as text, as the chat template writes it in an answered turn.

Between generation prompt and answer many templates write something: a space, a channel, an empty
thought, a mark of the response. A completion begins with that, as a sampled one would. What the
text spells itself stands there once, and white space around it where the template keeps it. A turn
that calls tools is what the template writes of it.
"""

from collections.abc import Sequence

from opcd.errors import InputError
from opcd.scoring.reasoning import opened_thought, split_thought
from opcd.tasks.kept import check_kept
from opcd.tasks.messages import Message
from opcd.tasks.template import ANSWER, Template
from opcd.tasks.tools import Tool


def completion_text(text: str, template: Template) -> str:
    """All that stands behind the generation prompt, up to what ends the turn.

    Raises InputError for a text of nothing but ends, for one without the end of a thought that the
    prompt opens, for a thought behind one that the prompt closes, and for templates of which that
    is not known.
    """
    opening, before, after, _ = template.frame
    text = _without_ends(text, template)
    if mark := opened_thought(opening):
        return _written(_behind_opened(text, mark, template), template) + after
    answer = split_thought(text).answer
    spelled = text.strip().removesuffix(answer or "")  # in front of the answer
    if spelled and _bare(opening + (before or "")).endswith(_bare(spelled)):
        text, spelled = answer or "", ""
    if spelled and _closes_thought(opening):
        raise InputError(
            f"a completion must be the answer alone where the chat template closes the thought in "
            f"front of it, as that of {template.name!r} does, got the thought {spelled[:60]!r}; "
            f"leave it out, or pass chat_template_args that let the model think"
        )
    if before is None:
        raise InputError(
            f"a completion as text needs a chat template that writes answers behind what opens "
            f"them, but that of {template.name!r} opens with {opening!r} and writes an answer "
            f"otherwise, or none; pass completion_token_ids, or name a file with "
            f"another template as chat_template"
        )
    if spelled or not before or (before.strip() and before.strip() in text):
        return _written(text, template) + after
    return before + _written(text.lstrip(), template) + after


def turn_text(
    turn: Message, request: Sequence[Message], template: Template, tools: Sequence[Tool] = ()
) -> str:
    """All that stands behind the generation prompt of a request where the turn calls tools.

    Raises InputError for a template that drops of the turn, or begins it otherwise than it opens an
    answer.
    """
    check_kept(template, [turn], lambda turns: [*request, *turns], tools, answered=True)
    opened = template.text(request, tools=tools)
    whole = template.text([*request, turn], answered=True, tools=tools)
    if not whole.startswith(opened):
        raise InputError(
            f"calls of tools as a completion need a chat template that writes them behind what "
            f"opens an answer, but that of {template.name!r} opens with "
            f"{template.opened(request)!r} and writes them otherwise; pass completion_token_ids, "
            f"or name a file with another template as chat_template"
        )
    return whole.removeprefix(opened)


def _written(text: str, template: Template) -> str:
    """The text as the template writes it; of a thought that it leaves out, the answer behind it."""
    whole = template.written(text)
    answer = split_thought(text).answer or ""
    thought, _, behind = text.rpartition(answer) if answer else ("", "", text)
    if not thought.strip() or (whole is not None and text.strip() in whole):
        return text if whole is None else whole
    written = template.written(answer + behind)
    return text if written is None else thought + written


def _behind_opened(text: str, mark: str, template: Template) -> str:
    """The rest of a thought that the prompt opens, and the answer."""
    bare = text.lstrip()
    if bare.startswith(mark.strip()):
        begun = bare.startswith(mark)
        text = bare.removeprefix(mark) if begun else bare.removeprefix(mark.strip()).lstrip()
    if not split_thought(mark + text).answer:
        raise InputError(
            f"a completion must end the thought that the chat template of {template.name!r} opens "
            f"in front of it ({mark.strip()}) and then answer, got {text[:60]!r}; write the "
            f"thought and its end into it, or pass chat_template_args (often "
            f"enable_thinking=false) so that none is opened"
        )
    return text


def _without_ends(text: str, template: Template) -> str:
    """Without what ends the turn, which follows anyway."""
    ends = [str(end) for end in template.tokenizer.convert_ids_to_tokens(template.stop_ids)]
    while spelled := [end for end in ends if text.rstrip().endswith(end)]:
        text = text.rstrip().removesuffix(spelled[0])
    if not text.strip():
        raise InputError("a completion must hold an answer, got what ends it alone; write one")
    return text


def _closes_thought(opening: str) -> bool:
    return split_thought(opening + ANSWER).answer == ANSWER != (opening + ANSWER).strip()


def _bare(text: str) -> str:
    return "".join(text.split())
