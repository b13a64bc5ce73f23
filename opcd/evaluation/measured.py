"""What a scorecard was measured by, as digests of contents, wherever their files lie."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from opcd.config import TrainConfig
from opcd.config.fields import FIELDS
from opcd.errors import InputError
from opcd.evaluation.decoding import decoding_of
from opcd.models.digest import model_digest
from opcd.tasks.chat import Chat
from opcd.tasks.messages import Message, assistant, system, user
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case

# Fields that are compared by what comes of them: what stands around a request, or a digest.
OF_THE_FORM = {
    *("context", "context_placement", "without_context", "today"),
    *("chat_template", "chat_template_args"),
}
DIGESTED = {"model", "teacher", "test_data", "test_sets", "elsewhere_data", "scorer"}
NOT_MEASURED_BY = {"output_dir", "prompts", "validation_data", "without_texts"}
PROBES: tuple[list[Message], ...] = (
    [user("What is zebra 7?")],
    [system("The customer is Ms Ng."), user("What is zebra 7?")],
    [user("What is zebra 7?"), assistant("It is zebra 8."), user("And zebra 9?")],
)


def measured_by(setup: Setup) -> dict[str, str | None]:
    """Digests of models, test rows with their accepted answers and without, requests elsewhere, and
    all else.

    The form of prompts is what stands around requests, without and with each context, and what
    ends answers.
    """
    config, task = setup.config, setup.task
    form = {name: [_prompts(chat, probe) for probe in PROBES] for name, chat in setup.chats.items()}
    rows = _rows(task.test)
    sets = {name: _rows(cases) for name, cases in sorted(task.test_sets.items())}
    elsewhere = [[request.example.messages, request.kind] for request in setup.elsewhere]
    model = model_digest(config.model)
    return {
        "form": _digest([form, sorted(setup.stop_ids)]),
        "model": model,
        "teacher": model_digest(config.teacher) if config.teacher else model,
        "test_data": test_digest(rows) if rows else None,
        "requests": _digest([[messages, context] for messages, _, context in rows]),
        "test_sets": _digest({name: test_digest(of) for name, of in sets.items()})
        if sets
        else None,
        "elsewhere_data": _digest(elsewhere) if elsewhere else None,
        "scorer": task.scorer.identity,
        "decoding": _digest(decoding_of(setup)),
    }


def test_digest(rows: Sequence[tuple[Sequence[Message], Sequence[str], str]]) -> str:
    """Of requests, each with its accepted answers and the name of its context."""
    return _digest([[messages, sorted(answers), context] for messages, answers, context in rows])


def other_fields(
    before: Mapping[str, Any],  # as `measured_by` gave it
    now: Mapping[str, Any],
    saved: TrainConfig,
    config: TrainConfig,
) -> list[str]:
    """The fields by which two measurements of prompts of one form differ."""
    by_value = set(saved.differing_fields(config)) - OF_THE_FORM - DIGESTED - NOT_MEASURED_BY
    by_content = {name for name in DIGESTED if before.get(name, now[name]) != now[name]}
    return [name for name in FIELDS if name in by_value | by_content]


def _prompts(chat: Chat, request: list[Message]) -> list[list[int]] | None:
    """A request's prompts, for student and teacher; None where the template does not take it."""
    try:
        return [chat.student_ids(request), chat.teacher_ids(request)]
    except InputError:
        return None


def _rows(cases: Sequence[Case]) -> list[tuple[Sequence[Message], Sequence[str], str]]:
    """Requests with their accepted answers and the names of their contexts."""
    return [(c.example.messages, c.example.answers, c.example.context) for c in cases]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
