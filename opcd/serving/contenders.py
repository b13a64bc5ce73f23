"""Who is measured, and what each is asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from opcd.errors import InputError
from opcd.models.adapter import adapter_settings, is_adapter
from opcd.models.by_name import resolve_model
from opcd.models.digest import local_folder
from opcd.tasks.messages import Message
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case

PROMPTED, CACHED, DISTILLED, ADAPTER = "prompted", "prompted_cached", "distilled", "adapter"
ADAPTERS = "adapter"  # a run's, in final/


class Contender(NamedTuple):
    """A model with or without the prompt."""

    name: str
    meaning: str  # for people
    prompted: bool  # whether requests come behind the context
    caching: bool  # whether a server keeps the keys and values of prefixes
    folder: Path  # the model's
    adapter: Path | None = None  # on it
    rank: int = 0


def contenders_of(setup: Setup, final: Path) -> list[Contender]:
    """Those of a run. Raises InputError for a model that is not on this machine."""
    name = setup.config.model
    base = local_folder(resolve_model(name))
    if base is None:
        raise InputError(
            f"the model before must be on this machine to be served, got {name!r}, which was not "
            f"fetched; fetch it, or name the base_url of a server that has it"
        )
    found = [
        Contender(PROMPTED, "before, with the prompt, no prefix cache", True, False, base),
        Contender(CACHED, "before, with the prompt, prefix cache", True, True, base),
        Contender(DISTILLED, "after, without the prompt", False, True, final.absolute()),
    ]
    if is_adapter(adapter := final.absolute() / ADAPTERS):
        rank = adapter_settings(adapter).get("r")
        if type(rank) is not int or rank < 1:
            raise InputError(
                f"{adapter} must say the rank of its matrices, got r {rank!r}; restore its "
                f"adapter_config.json"
            )
        meaning = "before with the adapter, without the prompt"
        found.append(Contender(ADAPTER, meaning, False, True, base, adapter, rank))
    return found


def cases_of(setup: Setup) -> list[Case]:
    """The requests to measure with: test data, or validation data, or training prompts."""
    return setup.task.test or setup.task.validation or setup.task.training


def messages_of(setup: Setup, cases: Sequence[Case], prompted: bool) -> list[list[Message]]:
    """Requests as a server is given them. Raises InputError for contexts with tools."""
    if any(chat.tools for chat in setup.chats.values()):
        raise InputError(
            "what is asked of a server must do without tools, got a context with some; measure "
            "with transformers, where no server is named"
        )
    found = []
    for case in cases:
        chat = setup.chats[case.prompt.context]
        form = chat.teacher_messages if prompted else chat.student_messages
        found.append(form(case.example.messages))
    return found


def longest(setup: Setup, cases: Sequence[Case]) -> int:
    """Tokens of the longest request behind its context."""
    return max(len(setup.task.prompted_ids(case.prompt)) for case in cases)
