"""A task: the context, the prompts of each part as token ids, and the scorer."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from statistics import fmean
from typing import NamedTuple, TypeVar

from opcd.config import TrainConfig
from opcd.config.fields import PARTS
from opcd.episodes import Episode, Prompt
from opcd.errors import InputError
from opcd.passes.prefix import shared_prefix_length
from opcd.runtime.files import shown
from opcd.scoring.scorers import Scorer, load_scorer
from opcd.tasks.chat import Chat
from opcd.tasks.contexts import Context, read_contexts
from opcd.tasks.data import (
    Example,
    alike_remarks,
    check_contexts,
    check_disjoint,
    check_same_answers,
    read_examples,
    repeat_remarks,
)
from opcd.tasks.gold import check_gold
from opcd.tasks.held_out import Parts, hold_out, with_their_answers
from opcd.tasks.limits import check_conversation, check_lengths, check_tokens
from opcd.tasks.messages import Message, user
from opcd.tasks.recorded import Recorded, recorded_ids
from opcd.tasks.tools import Tool
from opcd.tasks.turns import all_prompts, prompts_in, turns_remark

T = TypeVar("T")


class Case(NamedTuple):
    """One request of a task: as people wrote it, and as both models see it."""

    example: Example
    prompt: Prompt

    @property
    def source(self) -> str:
        """Where it stands, for error messages."""
        return self.example.source


@dataclass
class Task:
    """What is distilled, and how it is judged; the training loop knows nothing else about it."""

    # The tokens that all teacher prompts of a context start with, by the context's name.
    prefixes: dict[str, list[int]]
    training: list[Case]
    validation: list[Case]
    test: list[Case]
    scorer: Scorer
    # The tools of contexts that have some, by name; the teacher's prompts hold them, as rendered.
    tools: dict[str, list[Tool]] = field(default_factory=dict)
    # The conversations of the training part, where those are trained on as they were recorded: one
    # sequence each, or one for each turn.
    recorded: list[list[Episode]] = field(default_factory=list)
    # More test requests, by the name of their set.
    test_sets: dict[str, list[Case]] = field(default_factory=dict)

    @property
    def train(self) -> list[Prompt]:
        """The training prompts."""
        return [case.prompt for case in self.training]

    @property
    def conversations(self) -> list[list[Prompt]]:
        """The training prompts, those of one row together, each behind the one before it."""
        rows = groupby(self.training, key=lambda case: case.source)
        return [[case.prompt for case in cases] for _, cases in rows]

    def prompted_ids(self, prompt: Prompt | Episode) -> list[int]:
        """The whole prompt, or conversation, with its context in front."""
        return [*self.prefixes[prompt.context], *prompt.teacher_ids]

    @property
    def prompts(self) -> list[Prompt]:
        """Those of every part."""
        return [case.prompt for case in self.cases]

    @property
    def cases(self) -> list[Case]:
        """Those of every part."""
        return [*self.training, *self.validation, *self.scored]

    @property
    def scored(self) -> list[Case]:
        """What contenders of a scorecard answer: the test requests, and those of more sets."""
        return [*self.test, *(case for cases in self.test_sets.values() for case in cases)]

    @property
    def a_prefix(self) -> list[int]:
        """The first context's, to try models on."""
        return next(iter(self.prefixes.values()))

    def judges(self, cases: Sequence[Case]) -> bool:
        """Whether the scorer can say which completions of these are right."""
        return can_judge(self.scorer, cases)

    @property
    def context_digests(self) -> dict[str, str]:
        """What tells contexts apart, by their names: a digest of their tokens, and their tools."""
        parts = {
            name: [ids, self.tools[name]] if name in self.tools else ids
            for name, ids in sorted(self.prefixes.items())
        }
        return {
            name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16]
            for name, part in parts.items()
        }

    @property
    def training_digest(self) -> str:
        """What is trained on: a resumed run must see the very same token ids."""
        prefixes = [ids for _, ids in sorted(self.prefixes.items())]
        prompts = [[*p.student_ids, -1, *p.teacher_ids] for p in self.train]
        named = [p.context for p in self.train if p.context]
        recorded = [
            [e.student_ids, e.teacher_ids, e.spans] for e in chain.from_iterable(self.recorded)
        ]
        turns = [len(conversation) for conversation in self.conversations]
        together = [turns] if max(turns, default=1) > 1 else []  # what steps take
        ids = prefixes + prompts + named + recorded + together
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    @property
    def validation_digest(self) -> str:
        """What a checkpoint is chosen by: validation prompts and their accepted answers."""
        rows = [
            [case.prompt.student_ids, case.prompt.teacher_ids, case.prompt.context, answers]
            for case in self.validation
            for answers in [sorted(case.example.answers)]
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def shared_tokens(self) -> float:
        """Tokens in front of all of a context's prompts, on average over the test prompts."""
        return fmean(len(self.prefixes[p.context]) for p in self._typical)

    @property
    def prompt_tokens_saved(self) -> float:
        """Prompt tokens a request no longer carries, on average over the test prompts."""
        return fmean(len(self.prompted_ids(p)) - len(p.student_ids) for p in self._typical)

    @property
    def _typical(self) -> list[Prompt]:
        """The test prompts, or others where there are none."""
        return [case.prompt for case in self.test or self.training or self.validation]


def can_judge(scorer: Scorer, cases: Sequence[Case]) -> bool:
    """Whether a scorer can say which completions of these cases are right."""
    return bool(cases) and (bool(cases[0].example.answers) or not scorer.needs_answers)


class TaskFiles(NamedTuple):
    """A task's inputs, read and checked; everything that needs no model."""

    contexts: dict[str, Context]  # by name; one alone is ""
    parts: dict[str, list[Example]]
    scorer: Scorer
    remarks: list[str]  # for people, a line each


def read_task_files(config: TrainConfig) -> TaskFiles:
    """Read context, prompts and evaluation data. Raises InputError for whatever is wrong there."""
    contexts, remarks = read_contexts(config.context)
    files = {
        "train": config.prompts,
        "validation": config.validation_data,
        "test": config.test_data,
        **config.test_sets,
    }
    recorded = config.source == "recorded"
    parts: dict[str, list[Example]] = {}
    for part, path in files.items():
        parts[part] = []
        if path:
            training = part == "train"
            parts[part], said = read_examples(path, not training, contexts, training and recorded)
            remarks += said
    turn_by_turn = recorded or config.turns == "all"
    if not (config.validation_data or config.test_data):
        rows = parts["train"] if turn_by_turn else []
        inside = [prompt for row in rows for prompt in prompts_in(row)[:-1]]
        found = hold_out(parts["train"], config.held_out_share, inside)
        if config.prompts:
            found, said = with_their_answers(found, config.prompts)
            remarks += said
        parts |= found._asdict()
        remarks += _held_out_remarks(found, config)
    rows = parts["train"]
    if turn_by_turn and config.prompts:
        parts["train"] = all_prompts(rows)
        remarks.append(turns_remark(config.prompts, rows, len(parts["train"]), recorded))
    check_contexts(parts, contexts)
    check_disjoint(parts, contexts)
    remarks += alike_remarks(parts)
    if recorded:  # a conversation is trained on as a whole
        parts["train"] = rows
    if config.test_sets and not parts["test"]:
        raise InputError(
            f"test_sets must stand beside test data, got {', '.join(config.test_sets)} alone; name "
            f"one of the files as test_data"
        )
    measured = [part for part in parts if part != "train"]
    for part in measured:
        check_same_answers(parts[part])
        remarks += repeat_remarks(parts[part])
    scorer = load_scorer(config.scorer)
    for part in measured:
        if parts[part]:
            remarks += _unjudged(parts[part], str(files[part] or config.prompts), scorer, config)
    remarks += check_gold([example for part in measured for example in parts[part]], scorer)
    # What is said of a file holds of each part that comes of it.
    return TaskFiles(contexts, parts, scorer, [*dict.fromkeys(remarks)])


def _held_out_remarks(parts: Parts, config: TrainConfig) -> list[str]:
    total = sum(map(len, parts))
    kept_out = f"{len(parts.validation)} to choose the checkpoint by and {len(parts.test)} to test"
    if parts.test:
        judged = ", by the answers that they have" if parts.test[0].answers else ""
        return [
            f"of {total} {_kind(config)} {len(parts.train)} are trained on, {kept_out} the model "
            f"with{judged}"
        ]
    if config.held_out_share and total:
        return [
            f"{total} {_kind(config)} are too few to keep some out of training: nothing will be "
            f"measured without validation_data and test_data"
        ]
    return []


def _kind(config: TrainConfig) -> str:
    """What parts are made of where no data is named."""
    return "conversations" if config.source == "recorded" or config.turns == "all" else "prompts"


def _unjudged(
    examples: Sequence[Example], file: str, scorer: Scorer, config: TrainConfig
) -> list[str]:
    """A line where nothing says which answers are right. Raises InputError with a named scorer."""
    if examples[0].answers or not scorer.needs_answers:
        return []
    if scorer.spec != TrainConfig.scorer:
        raise InputError(
            f"{file}: scorer {scorer.spec} compares with accepted answers, got rows without; add "
            f'"answer" to each, leave scorer out, write a function that needs none, or set '
            f"held_out_share to 0"
        )
    return [f"{shown(file)} has no answers: models are held against what the prompted one says"]


def render_task(
    files: TaskFiles,
    chats: Mapping[str, Chat],  # by the name of the context
    max_positions: int | None,
    max_completion_tokens: int,
    vocab_size: int,  # of the model: its embeddings
    recorded_ends: Collection[int] = (),  # tokens that end recorded turns; () leaves those out
) -> Task:
    """Turn the files into token ids, and find the prefix that a context's prompts share.

    Raises InputError if a prompt with its context, or without it, does not fit the model, or holds
    a token that the model has no embedding for; so for recorded conversations.
    """
    by_example: dict[int, Case] = {}
    episodes: dict[int, list[Episode]] = {}
    prefixes = {}
    for name, chat in chats.items():
        examples = [e for part in files.parts.values() for e in part if e.context == name]
        if not examples:
            continue
        with_context = [rendered(chat.teacher_ids, example) for example in examples]
        conversations = [
            (example, recorded_ids(chat, example, recorded_ends))
            for example in files.parts["train"]
            if recorded_ends and example.turn and example.context == name
        ]
        # A first user message of another kind: the common start must be the context's alone.
        probes = [chat.teacher_ids([user(t)]) for t in ("Hm?", "3 + 4")]
        whole = [one.teacher_ids for _, found in conversations for one in found]
        length = shared_prefix_length([*with_context, *whole, *probes])
        if length == 0:
            raise InputError(
                "the rendered prompts must start with the context, but have no common first "
                "token; look at the chat template"
            )
        lengths = [len(ids) for ids in with_context]
        check_lengths(examples, lengths, max_completion_tokens, max_positions, length)
        prefixes[name] = with_context[0][:length]
        for example, ids in zip(examples, with_context, strict=True):
            student_ids = rendered(chat.student_ids, example)
            check_tokens([*ids, *student_ids], vocab_size, chat.template.tokenizer, example)
            prompt = Prompt(student_ids, ids[length:], name)
            by_example[id(example)] = Case(example, prompt)
        for example, found in conversations:
            for one in found:
                check_conversation(example, len(one.teacher_ids), max_positions)
                ids = [*one.student_ids, *one.teacher_ids]
                check_tokens(ids, vocab_size, chat.template.tokenizer, example)
            episodes[id(example)] = [_episode(one, length, name) for one in found]

    def cases(part: str) -> list[Case]:
        return [by_example[id(example)] for example in files.parts[part]]

    tools = {name: chats[name].tools for name in prefixes if chats[name].tools}
    recorded = [episodes[id(e)] for e in files.parts["train"] if id(e) in episodes]
    parts = cases("train"), cases("validation"), cases("test")
    sets = {name: cases(name) for name in files.parts if name not in PARTS}
    return Task(prefixes, *parts, files.scorer, tools, recorded, sets)


def _episode(found: Recorded, shared: int, context: str) -> Episode:
    """A recorded conversation, for the teacher behind the tokens that all prompts share."""
    spans = tuple(s._replace(teacher_start=s.teacher_start - shared) for s in found.spans)
    return Episode(found.student_ids, found.teacher_ids[shared:], spans, context)


def rendered(render: Callable[[Sequence[Message]], list[int]], example: Example) -> list[int]:
    """An example's token ids. Raises InputError, which names its place."""
    try:
        return render(example.messages)
    except InputError as error:
        raise InputError(f"{example.source}: {error}") from error


def spread(cases: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, evenly spread over the file's order."""
    if len(cases) <= count:
        return list(cases)
    return [cases[i * len(cases) // count] for i in range(count)]
