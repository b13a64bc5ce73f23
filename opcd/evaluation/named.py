"""Contenders that people name: models, adapters, prompts, soft prompts, servers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from opcd.errors import InputError
from opcd.evaluation.contenders import Answer, Contender, Models
from opcd.evaluation.server import Server, server_contenders
from opcd.evaluation.soft_prompt import (
    check_positions,
    is_soft_prompt,
    read_soft_prompt,
    soft_prompt_answers,
)
from opcd.models.adapter import check_adapter, is_adapter
from opcd.models.by_name import (
    check_same_tokenizer,
    load_config,
    load_tokenizer,
    resolve_model,
)
from opcd.models.lm import max_positions
from opcd.tasks.chat import Chat
from opcd.tasks.contexts import TEXTS, read_contexts
from opcd.tasks.data import check_disjoint
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case, rendered

OF_A_RUN = ("base", "prompted", "teacher", "distilled", "distilled_prompted")
OF_A_ROW = ("context", "prompt", "accepted", "data")  # what else a row of answers.jsonl has
# Of names that stand beside a contender's there.
ENDS = ("_right", "_rates", "_tokens", "_cut", "_raw", "_nats")
Named = Callable[[Models], Sequence[Contender]]


def named_contenders(
    given: Mapping[str, str],  # what each is, by its name
    setup: Setup,
    served_model: str | None = None,  # of a server that has several
) -> Named:
    """Those that answer beside a run's own; what does not fit is said before weights are loaded.

    What is given says by itself what it is: the address of a server (http://...), a prompt (.md,
    .txt or .json) that the base gets in place of the context, the folder of an adapter or of a soft
    prompt on the base, or a model. Models, adapters and soft prompts answer without the context; a
    server answers twice, without and with it.

    Raises InputError for a name that means something else, and for what is not there or does not
    fit the base.
    """
    makers = [_maker(name, what, setup, served_model) for name, what in given.items()]
    if served_model is not None and not any(map(_is_address, given.values())):
        raise InputError(
            f"served_model must come with a server, got {served_model!r} alone; name its base_url"
        )

    def named(models: Models) -> list[Contender]:
        return [contender for make in makers for contender in make(models)]

    return named


def _maker(name: str, what: str, setup: Setup, served_model: str | None) -> Named:
    _check_name(name)
    if _is_address(what):
        both = server_contenders(Server(what, served_model), setup, name)
        return lambda _: both
    base, folder = setup.config.model, Path(what).expanduser()
    if folder.exists():
        what = str(folder)
    if folder.suffix.lower() in (*TEXTS, ".json"):
        return _prompt(name, what, setup)
    if is_adapter(folder) and is_soft_prompt(folder):
        if setup.config.eval_temperature:
            raise InputError(
                f"a soft prompt must be asked for its likeliest answers, got eval_temperature "
                f"{setup.config.eval_temperature}; set it to 0, or leave {name} out"
            )
        check_adapter(folder, base)
        vectors = read_soft_prompt(folder, base)
        check_positions(vectors, setup.config, setup.task.scored)
        meaning = f"before, behind a soft prompt of {len(vectors)}"
        return lambda models: [
            Contender(name, meaning, lambda c: soft_prompt_answers(models.get(base), vectors, c))
        ]
    if is_adapter(folder):
        check_adapter(folder, base)
        meaning = f"adapter {folder.name}, without the context"
    else:
        resolve_model(what, f"contender {name}")
        check_same_tokenizer(setup.tokenizer, load_tokenizer(what), f"contender {name} and base")
        meaning = f"{folder.name}, without the context"
    return lambda models: [Contender(name, meaning, lambda c: models.get(what).alone(c))]


def _is_address(what: str) -> bool:
    return what.startswith(("http://", "https://"))


def _check_name(name: str) -> None:
    """Raise InputError for a name that a row of answers has for something else."""
    taken = name in (*OF_A_RUN, *OF_A_ROW)
    if not name.isidentifier() or taken or name.endswith((*ENDS, "_prompted")):
        raise InputError(
            f"a contender's name must be one word of its own (letters, digits, _), not "
            f"{', '.join(OF_A_RUN)}, nor end with {', '.join(ENDS)} or _prompted, got {name!r}; "
            f"write NAME=WHAT with another name"
        )


def _prompt(name: str, what: str, setup: Setup) -> Named:
    """The base behind another prompt. Raises InputError where requests do not fit behind it."""
    config = setup.config
    contexts, _ = read_contexts(what)
    alone = contexts.get("")
    own_system = any(case.example.own_system for case in setup.task.scored)
    chats = {
        context: Chat(
            setup.chat.template,
            found.messages,
            config.context_placement,
            config.without_context,
            own_system,
            found.tools,
        )
        for context, found in contexts.items()
    }
    if alone is None and (lacking := set(setup.chats) - set(chats)):
        raise InputError(
            f"a prompt must hold each of the contexts, or be one for all, got {what!r} without "
            f"{', '.join(sorted(lacking)) or 'one for requests that name none'}; add them"
        )

    def context_of(case: Case) -> str:
        return "" if alone is not None else case.prompt.context

    def ids(case: Case) -> list[int]:
        return rendered(chats[context_of(case)].teacher_ids, case.example)

    asked = [replace(case.example, context=context_of(case)) for case in setup.task.scored]
    try:
        check_disjoint({"test": asked}, contexts)
    except InputError as error:
        raise InputError(f"contender {name}: {error}") from error

    prompts = {id(case): ids(case) for case in setup.task.scored}
    limit = max_positions(load_config(config.model))
    longest = max(map(len, prompts.values())) + config.max_completion_tokens
    if limit is not None and longest > limit:
        raise InputError(
            f"prompt, request and answer must fit the model's {limit} positions, got {longest} "
            f"with {what!r}; shorten it"
        )

    def answer(models: Models, cases: Sequence[Case]) -> list[Answer]:
        asked = [prompts[id(case)] for case in cases]
        return models.get(config.model).answers(asked, [case.prompt for case in cases])

    meaning = f"before, with {Path(what).name}"
    return lambda models: [Contender(name, meaning, lambda cases: answer(models, cases))]
