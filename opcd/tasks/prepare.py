"""Everything of a run that can be wrong before weights are loaded."""

import hashlib
import json
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from opcd.config import TrainConfig
from opcd.models.by_name import (
    check_trainable,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from opcd.models.lm import check_rope, max_positions, stop_at
from opcd.objective import check_head
from opcd.tasks.chat import Chat, check_same_tokenizer
from opcd.tasks.stored import read_stored
from opcd.tasks.task import Task, read_task_files, render_task


class Setup(NamedTuple):
    """What training and evaluation both need; nothing in it has cost long work."""

    config: TrainConfig  # device and dtype resolved
    task: Task
    chat: Chat
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    stored: dict[int, list[list[int]]] | None  # guided completions from a file, by prompt

    @property
    def fingerprint(self) -> str:
        """Digest of what is trained on: a resumed run must see the very same token ids."""
        if not self.stored:
            return self.task.fingerprint
        text = self.task.fingerprint + json.dumps(sorted(self.stored.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def load(self, name: str, dtype: torch.dtype | None = None) -> Any:
        """A model that stops where the chat template does and whose head the loss can use.

        Its weights are in the dtype of the passes, unless another is asked for.
        """
        model = load_model(name, dtype or self.dtype, self.device)
        stop_at(model, self.tokenizer.eos_token_id)
        check_head(model, self.task.prompts[0].student_ids)
        return model


def prepare(config: TrainConfig, for_training: bool = False) -> Setup:
    """Read and check everything that can be wrong before weights are loaded."""
    config.check()
    files = read_task_files(config)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    if for_training:
        check_trainable(config.model)
    tokenizer = load_tokenizer(config.model)
    configs = [load_config(config.model)]
    if config.teacher:
        check_same_tokenizer(tokenizer, load_tokenizer(config.teacher))
        configs.append(load_config(config.teacher))
    chats = {
        name: Chat(tokenizer, context, config.chat_template_args)
        for name, context in files.contexts.items()
    }
    limits = [x for x in map(max_positions, configs) if x is not None]
    limit = min(limits, default=None)
    task = render_task(files, chats, limit, config.max_completion_tokens)
    for model_config in configs:
        for lengths in (
            [len(p.student_ids) for p in task.prompts],
            [len(task.prompted_ids(p)) for p in task.prompts],
        ):
            longest = max(lengths) + config.max_completion_tokens
            check_rope(model_config, min(lengths) + 1, longest)
    resolved = replace(config, device=str(device))
    resolved.dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    stored = None
    if for_training and config.guided_completions is not None:
        examples, limit = files.parts["train"], config.max_completion_tokens
        stored = read_stored(config.guided_completions, task, examples, tokenizer, limit)
    chat = next(iter(chats.values()))
    return Setup(resolved, task, chat, tokenizer, device, dtype, stored)
