"""Everything of a run that can be wrong before weights are loaded."""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from opcd.config import TrainConfig
from opcd.config.settings import read_config_file
from opcd.errors import InputError
from opcd.models.by_name import (
    check_same_tokenizer,
    check_trainable,
    load_config,
    load_eos_token_ids,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
    sampling_defaults,
)
from opcd.models.head import head_of
from opcd.models.lm import check_ends, check_rope, max_positions, stop_at
from opcd.scoring.reasoning import MARKS
from opcd.tasks.chat import Chat
from opcd.tasks.completions import read_completions
from opcd.tasks.contexts import Context
from opcd.tasks.elsewhere import ANSWER_TOKENS, Request, read_elsewhere
from opcd.tasks.replay import Replay, limit_of, read_replay
from opcd.tasks.special_tokens import placed_texts, special_token_remarks, special_tokens_in
from opcd.tasks.task import Task, read_task_files, render_task
from opcd.tasks.template import Template, read_template


class Setup(NamedTuple):
    """What training and evaluation both need; nothing in it has cost long work."""

    config: TrainConfig  # device and dtype resolved
    task: Task
    elsewhere: list[Request]
    chats: dict[str, Chat]  # by the name of the context
    stop_ids: list[int]  # the tokens that end a completion
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    # Guided completions from a file: token ids by the prompt's key.
    completions: dict[int, list[list[int]]] | None
    remarks: list[str]  # what people should know of files and template, a line each
    replay: Replay | None = None  # prompts on which the student is held to the original model

    @property
    def chat(self) -> Chat:
        """Any of them: completions are read alike."""
        return next(iter(self.chats.values()))

    @property
    def prompt_lines(self) -> list[str]:
        """What a student's prompts begin with and what ends its answers, for people."""
        ends = [*map(str, self.tokenizer.convert_ids_to_tokens(self.stop_ids))]
        ends += map(repr, self.config.stop)
        return [
            *(
                f"without   {text!r} stands in front of a request"
                for text in dict.fromkeys(chat.stand_in for chat in self.chats.values())
            ),
            f"answers   end with {', '.join(ends)}, or at "
            f"{self.config.max_completion_tokens} tokens",
        ]

    @property
    def notes(self) -> list[str]:
        """What was decided for people, a line each."""
        return [f"note      {remark}" for remark in self.remarks]

    @property
    def fingerprint(self) -> str:
        """Digest of what is trained on: a resumed run must see the very same token ids."""
        more: list[Any] = [sorted(self.completions.items())] if self.completions else []
        more += [[p.student_ids for p in self.replay.prompts]] if self.replay else []
        if not more:
            return self.task.training_digest
        text = self.task.training_digest + "".join(map(json.dumps, more))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def selection_fingerprint(self) -> str:
        """Digest of what a checkpoint is chosen by: validation prompts, answers and scorer."""
        text = self.task.validation_digest + self.task.scorer.identity
        return hashlib.sha256(text.encode()).hexdigest()

    def load(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """A model that stops where all of the task's do and whose head the loss can use.

        Its weights are in the dtype of the passes, unless another is asked for.
        """
        model = load_model(name, dtype or self.dtype, self.device)
        stop_at(model, self.stop_ids)
        before = [p._version for p in model.parameters()]
        head_of(model)  # refuses what the loss cannot use
        if before != [p._version for p in model.parameters()]:
            raise InputError(
                f"{name} must leave its weights as they are when it is called, but a "
                f"{type(model).__name__} changes them: what is saved of it would be another model; "
                f"choose another"
            )
        return model


def on_this_machine(config: TrainConfig) -> TrainConfig:
    """A run's configuration with a device that is here, where its own is another machine's."""
    try:
        resolve_device(config.device)
    except InputError:
        return replace(config, device="auto")
    return config


def prepare(config: TrainConfig, for_training: bool = False) -> Setup:
    """Read and check everything that can be wrong before weights are loaded."""
    config.check()
    if for_training and config.prompts is None:
        raise InputError("prompts must be given to train on; name a file as prompts")
    files = read_task_files(config)
    if not any(files.parts.values()):
        raise InputError(
            "there must be requests to train or to measure on, got none; name a file as prompts or "
            "test_data"
        )
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if for_training:
        check_trainable(config.model)
    tokenizer = load_tokenizer(config.model)
    configs = [load_config(config.model)]
    if config.teacher:
        check_same_tokenizer(tokenizer, load_tokenizer(config.teacher))
        configs.append(load_config(config.teacher))
        _check_rows(*(c.get_text_config().vocab_size for c in configs))
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    template = Template(tokenizer, config.chat_template_args, _day(config))
    own_system = {e.context for part in files.parts.values() for e in part if e.own_system}
    chats = {
        name: _chat(template, name, context, config, name in own_system)
        for name, context in files.contexts.items()
    }
    limit = min((x for x in map(max_positions, configs) if x is not None), default=None)
    rows = min(c.get_text_config().vocab_size for c in configs)
    # What ends the teacher's answers ends the student's, who learns to end by it.
    models = filter(None, (config.model, config.teacher))
    own_ends = [token for name in models for token in load_eos_token_ids(name)]
    stop_ids = list(dict.fromkeys([*own_ends, *template.stop_ids]))
    check_ends(stop_ids, config.model)
    _check_stops(config.stop, tokenizer)
    ends = stop_ids if for_training else []
    task = render_task(files, chats, limit, config.max_completion_tokens, rows, ends)
    elsewhere, found = read_elsewhere(config, files, next(iter(chats.values())), limit, rows)
    replay: Replay | None = None
    if for_training and config.replay_share:
        chat = next(iter(chats.values()))
        replay, told = read_replay(config, files, elsewhere, chat, limit, rows)
        found += told
    _check_rope(configs, task, elsewhere, replay, config)
    resolved = replace(config.with_implied(), device=str(device))
    resolved.dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    dated = any(chat.dated for chat in chats.values())
    resolved.today = template.day.isoformat() if dated else None
    completions = None
    said: list[str] = []
    if for_training and config.guided_completions is not None:
        train = files.parts["train"]
        completions, said = read_completions(config, task, train, chats, stop_ids)
    placed = [
        *placed_texts(files.parts, files.contexts),
        ("without_context", config.without_context),
    ]
    remarks = [
        *files.remarks,
        *found,
        *said,
        *special_token_remarks(placed, tokenizer),
        *_remarks(resolved, chats, task),
    ]
    return Setup(
        resolved,
        task,
        elsewhere,
        chats,
        stop_ids,
        tokenizer,
        device,
        dtype,
        completions,
        remarks,
        replay,
    )


def _chat(
    template: Template, name: str, context: Context, config: TrainConfig, own_system: bool
) -> Chat:
    """Of one context. An error says where the tools stand, if it has some."""
    placed = config.context_placement, config.without_context
    try:
        return Chat(template, context.messages, *placed, own_system, context.tools)
    except InputError as error:
        if not context.tools:
            raise
        where = f"{config.context}: {name}" if name else config.context
        raise InputError(f"{where}: {error}") from error


def _check_stops(strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a stop string that no completion's text can hold."""
    found = special_tokens_in(strings, tokenizer)
    marks = {token for token in found if token not in MARKS}
    if marks:
        raise InputError(
            f"stop must hold texts that completions are decoded to, got the special token "
            f"{min(marks)!r}, which is left out of them; a token that ends answers is named as EOS "
            f"by the model's generation_config.json"
        )


def _check_rows(student: int, teacher: int) -> None:
    """Raise InputError if the student can sample a token that the teacher has no embedding for."""
    if student > teacher:
        raise InputError(
            f"the teacher must have an embedding for every token of the student, got {teacher} and "
            f"{student} rows; choose a teacher with as many rows, padding included"
        )


def _check_rope(
    configs: Sequence[PretrainedConfig],
    task: Task,
    elsewhere: Sequence[Request],
    replay: Replay | None,
    config: TrainConfig,
) -> None:
    """Raise InputError if sequences lie on both sides of where rotary frequencies change."""
    recorded = [
        (len(e.student_ids), len(task.prompted_ids(e))) for e in chain.from_iterable(task.recorded)
    ]
    asked = [(len(p.student_ids), len(task.prompted_ids(p))) for p in task.prompts]
    others = [len(request.token_ids) for request in elsewhere]
    bounds = [[(n + 1, n + ANSWER_TOKENS) for n in others]]
    again = [len(prompt.student_ids) for prompt in replay.prompts] if replay else []
    # They share the student's passes with the task, and none of the teacher's.
    replayed = [(n + 1, n + limit_of(config)) for n in again]
    for side in (0, 1):
        lengths = [(n[side] + 1, n[side] + config.max_completion_tokens) for n in asked]
        lengths += [(n[side], n[side]) for n in recorded]
        bounds += [lengths + replayed] if side == 0 else [lengths, replayed]
    for model_config in configs:
        for found in filter(None, bounds):
            check_rope(model_config, min(low for low, _ in found), max(high for _, high in found))


def _day(config: TrainConfig) -> date:
    """What templates take for today: as configured, or the day on which the run began."""
    day, kept = config.today, Path(config.output_dir) / "config.yaml"
    if day is None and kept.is_file():
        with contextlib.suppress(InputError):  # said elsewhere
            day = read_config_file(kept)[1].get("today")
    try:
        return date.fromisoformat(str(day)) if day else date.today()
    except ValueError as error:
        raise InputError(f"today must be a date like 2026-11-26, got {day!r}") from error


def _remarks(config: TrainConfig, chats: Mapping[str, Chat], task: Task) -> list[str]:
    """What was decided about the chat template, and where it puts the context."""
    remarks = []
    if defaults := sampling_defaults(config.model):
        listed = ", ".join(f"{name} {value}" for name, value in defaults.items())
        remarks.append(
            f"generation_config.json of the model sets {listed}: nothing here is drawn so, but "
            f"generate() and servers do it where a request does not say otherwise"
        )
    if config.today:
        remarks.append(f"the chat template writes today's date: this run keeps {config.today}")
    if config.context_placement == "auto" and any(
        chat.placement == "user" for chat in chats.values()
    ):
        remarks.append(
            "the chat template does not take the context as a system message, or a request's own "
            "behind it: it stands in front of the first user message"
        )
    if parted := [len(found) for found in task.recorded if len(found) > 1]:
        remarks.append(
            f"{len(parted)} of {len(task.recorded)} recorded conversations are trained on turn by "
            f"turn, as {sum(parted)} sequences: the chat template writes earlier turns otherwise "
            f"than the last one"
        )
    if task.shared_tokens < 0.8 * task.prompt_tokens_saved:
        remarks.append(
            f"only {task.shared_tokens:.0f} of about {task.prompt_tokens_saved:.0f} context tokens "
            f"stand in front of all prompts: the chat template puts the rest elsewhere, and it is "
            f"computed with every sequence"
        )
    examples = {case.example.context: case.example for case in task.cases}
    for name, example in examples.items():
        chat, prefix = chats[name], task.prefixes[name]
        if chat.tools and not chat.holds_tools(prefix, example.messages):
            whose = f"of context {name!r} " if name else ""
            remarks.append(
                f"the tools {whose}are not shared: the chat template writes their schemas behind "
                f"where prompts begin to differ, and they are computed with every sequence"
            )
    return remarks
