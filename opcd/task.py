"""A task: the context, the prompts of each part as token ids, and the scorer."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from opcd.chat import Chat, check_lengths
from opcd.config import TrainConfig
from opcd.data import Example, Message, check_disjoint, read_context, read_examples
from opcd.errors import InputError
from opcd.prefix import shared_prefix_length
from opcd.scorers import Scorer, load_scorer


class Prompt(NamedTuple):
    """One prompt as both models see it."""

    example: Example
    student_ids: list[int]  # without the context
    teacher_ids: list[int]  # with the context, behind the shared prefix


@dataclass
class Task:
    """What is distilled, and how it is judged; the training loop knows nothing else about it."""

    prefix_ids: list[int]  # the tokens that all teacher prompts start with
    train: list[Prompt]
    validation: list[Prompt]
    test: list[Prompt]
    scorer: Scorer

    @property
    def fingerprint(self) -> str:
        """Digest of what is trained on: a resumed run must see the very same token ids."""
        ids = [self.prefix_ids, *[[*p.student_ids, -1, *p.teacher_ids] for p in self.train]]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    @property
    def prompt_tokens_saved(self) -> float:
        """Prompt tokens a request no longer carries, on average over the test prompts."""
        prompts = self.test or self.train
        return fmean(
            len(self.prefix_ids) + len(p.teacher_ids) - len(p.student_ids) for p in prompts
        )


class TaskFiles(NamedTuple):
    """A task's inputs, read and checked; everything that needs no model."""

    context: list[dict[str, str]]
    parts: dict[str, list[Example]]
    scorer: Scorer


def read_task_files(config: TrainConfig) -> TaskFiles:
    """Read context, prompts and evaluation data. Raises InputError for whatever is wrong there."""
    context = read_context(config.context)
    parts = {"train": read_examples(config.prompts, answers_required=False)}
    for part, path in (("validation", config.validation_data), ("test", config.eval_data)):
        parts[part] = read_examples(path, answers_required=True) if path else []
    check_disjoint(parts, context)
    scorer = load_scorer(config.scorer)
    for example in parts["validation"] + parts["test"]:
        for completion in ("", "a completion"):
            scorer(completion, example.answers)  # a scorer that raises must be found out here
    return TaskFiles(context, parts, scorer)


def render_task(
    files: TaskFiles, chat: Chat, max_positions: int | None, max_completion_tokens: int
) -> Task:
    """Turn the files into token ids, and find the prefix that all of the teacher's prompts share.

    Raises InputError if a prompt with the context, or without it, does not fit the model.
    """
    everything = [example for part in files.parts.values() for example in part]
    with_context = [_render(chat.teacher_ids, example) for example in everything]
    # A first user message of another kind: the common start must be the context's alone.
    probes = [chat.teacher_ids([{"role": "user", "content": text}]) for text in ("Hm?", "3 + 4")]
    length = shared_prefix_length([*with_context, *probes])
    if length == 0:
        raise InputError(
            "the rendered prompts must start with the context, but have no common first token; "
            "look at the chat template"
        )
    check_lengths(
        everything, [len(ids) for ids in with_context], max_completion_tokens, max_positions, length
    )
    rendered = {
        id(example): Prompt(example, _render(chat.student_ids, example), ids[length:])
        for example, ids in zip(everything, with_context, strict=True)
    }

    def prompts(part: str) -> list[Prompt]:
        return [rendered[id(example)] for example in files.parts[part]]

    return Task(
        with_context[0][:length],
        prompts("train"),
        prompts("validation"),
        prompts("test"),
        files.scorer,
    )


def _render(render: Callable[[Sequence[Message]], list[int]], example: Example) -> list[int]:
    try:
        return render(example.messages)
    except InputError as error:
        raise InputError(f"{example.source}: {error}") from error


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """At most `count` prompts, evenly spread over the file's order."""
    if len(prompts) <= count:
        return list(prompts)
    return [prompts[i * len(prompts) // count] for i in range(count)]
