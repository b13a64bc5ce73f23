"""Prompts that have nothing to do with a context, on which a student is held to the original model.

160 come with opcd, or a user's own. They are trained on, so that none may be among the requests
that the scorecard asks, elsewhere or in the test data.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from opcd.config import TrainConfig
from opcd.episodes import Prompt
from opcd.errors import InputError
from opcd.passes.prefix import shared_prefix_length
from opcd.tasks.chat import Chat
from opcd.tasks.data import NO_CONTEXT, Example, also_in
from opcd.tasks.elsewhere import BUILT_IN as ELSEWHERE
from opcd.tasks.elsewhere import Request, read_requests
from opcd.tasks.limits import check_tokens
from opcd.tasks.messages import user
from opcd.tasks.special_tokens import placed_texts, special_token_remarks
from opcd.tasks.task import TaskFiles, rendered, spread

BUILT_IN = Path(__file__).with_suffix(".jsonl")
FEWEST_TOKENS = 32  # of a completion's limit: answers elsewhere are no labels, as a task's may be
WITHOUT = " without a context"  # its name, as for the teacher: users' have no space in front


class Replay(NamedTuple):
    """The prompts, for a teacher that sees no context either."""

    prefix: list[int]  # what all prompts start with, where a context would be
    prompts: list[Prompt]


def limit_of(config: TrainConfig) -> int:
    """At how many tokens a replayed prompt's completion is cut, whatever the task's answers are."""
    return max(config.max_completion_tokens, FEWEST_TOKENS)


def read_replay(
    config: TrainConfig,
    files: TaskFiles,
    elsewhere: Sequence[Request],
    chat: Chat,
    max_positions: int | None,
    vocab_size: int,  # of the model: its embeddings
) -> tuple[Replay, list[str]]:
    """The prompts as both models see them, and remarks on how the file was read.

    Raises InputError for a prompt that is measured on as well, and for one that does not fit.
    """
    path = config.replay_data or str(BUILT_IN)
    rows, remarks = read_requests(path, "replay_data", files.contexts)
    examples = [example for example, _ in rows]
    measured = {name: part for name, part in files.parts.items() if name != "train"}
    _check_apart(examples, measured | {"elsewhere": [request.example for request in elsewhere]})
    if common := also_in(examples, {"train": files.parts["train"]}):
        remarks.append(
            f"{Path(path).name}: {len(common)} of {len(examples)} replayed prompts are training "
            f"prompts as well, first {common[0].source}: there the student is held to what the "
            f"model says without the context"
        )
    ids = [rendered(chat.student_ids, example) for example in examples]
    for example, prompt in zip(examples, ids, strict=True):
        check_tokens(prompt, vocab_size, chat.template.tokenizer, example)
        if max_positions is not None and len(prompt) + limit_of(config) > max_positions:
            raise InputError(
                f"{example.source}: a replayed prompt and its completion ({limit_of(config)} "
                f"tokens) must fit the model's {max_positions} positions, got {len(prompt)} "
                f"tokens; shorten or remove it"
            )
    probes = [chat.student_ids([user(text)]) for text in ("Hm?", "3 + 4")]
    length = shared_prefix_length([*ids, *probes])
    if length == 0:
        raise InputError(
            "prompts without the context must start with a common token to be replayed, got none; "
            "set replay_share to 0, or look at the chat template"
        )
    prompts = [Prompt(prompt, prompt[length:], WITHOUT) for prompt in ids]
    placed = placed_texts({"replay": examples}, {})
    remarks += special_token_remarks(placed, chat.template.tokenizer)
    return Replay(ids[0][:length], prompts), remarks


def check_replay_apart(config: TrainConfig, measured: Mapping[str, Sequence[Example]]) -> None:
    """Hold what will be replayed against requests that a run itself does not see.

    measured: those, by what they are called; requests elsewhere are read here. Raises InputError
    for a prompt that is measured on as well.
    """
    if not config.replay_share:
        return
    none = {"": NO_CONTEXT}
    rows, _ = read_requests(config.replay_data or str(BUILT_IN), "replay_data", none)
    elsewhere: list[Example] = []
    if config.elsewhere_prompts:
        path = config.elsewhere_data or str(ELSEWHERE)
        asked, _ = read_requests(path, "elsewhere_data", none)
        elsewhere = [example for example, _ in spread(asked, config.elsewhere_prompts)]
    _check_apart([example for example, _ in rows], {**measured, "elsewhere": elsewhere})


def _check_apart(examples: Sequence[Example], measured: Mapping[str, Sequence[Example]]) -> None:
    if common := also_in(examples, measured):
        raise InputError(
            f"{common[0].source}: a prompt that is replayed must not be measured on, got "
            f"{len(common)} of {len(examples)} that stand in validation or test data or elsewhere "
            f"as well ({common[0].text[:40]!r}); remove them from one of both"
        )
