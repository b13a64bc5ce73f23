"""A contender whose prompt is trained vectors in front of the request (Lester et al., 2021).

As peft stores one (`PromptTuningConfig`): one matrix, put in front of the embeddings of whatever
the model is given. Sequences are batched by length, so that no pads stand behind the vectors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.contenders import Answer, LoadedModel, answer
from opcd.models.adapter import WEIGHTS, adapter_settings
from opcd.models.by_name import load_config
from opcd.models.lm import (
    cache_argument,
    cache_of,
    causal_lm,
    eos_token_ids,
    last_logits,
    max_positions,
)
from opcd.rollouts.protocol import SamplingParams
from opcd.tasks.task import Case

KIND, NAME = "PROMPT_TUNING", "prompt_embeddings"


def is_soft_prompt(folder: Path) -> bool:
    """Whether an adapter's folder holds virtual tokens of any kind."""
    return "num_virtual_tokens" in adapter_settings(folder)


def read_soft_prompt(folder: Path, base: str) -> Tensor:  # (P, D) fp32
    """The vectors of a folder. Raises InputError for those of another kind, or of another base."""
    kind = adapter_settings(folder).get("peft_type")
    if kind != KIND:
        raise InputError(
            f"a soft prompt must be one of peft's prompt tuning, got {kind} in {str(folder)!r}; "
            f"train it with PromptTuningConfig"
        )
    with safe_open(folder / WEIGHTS, "pt") as file:
        vectors: Tensor = file.get_tensor(NAME).float()
    width = load_config(base).get_text_config().hidden_size
    if vectors.shape[1] != width:
        raise InputError(
            f"a soft prompt must be as wide as the embeddings of {base!r}, {width}, got "
            f"{vectors.shape[1]} in {str(folder)!r}; name its own base as model"
        )
    return vectors


def check_positions(vectors: Tensor, config: TrainConfig, cases: Sequence[Case]) -> None:
    """Raise InputError for a request that does not fit the model's positions behind the vectors."""
    limit = max_positions(load_config(config.model))
    longest = max(len(case.prompt.student_ids) for case in cases)
    longest += len(vectors) + config.max_completion_tokens
    if limit is not None and longest > limit:
        raise InputError(
            f"soft prompt, request and answer must fit the model's {limit} positions, got "
            f"{longest}; leave the soft prompt out"
        )


def soft_prompt_answers(model: LoadedModel, vectors: Tensor, cases: Sequence[Case]) -> list[Answer]:
    """Greedy answers of the base behind the vectors, without the context."""
    setup, prompts = model.setup, [case.prompt.student_ids for case in cases]
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(i)
    found: dict[int, tuple[list[int], str]] = {}
    for members in by_length.values():
        for start in range(0, len(members), setup.config.rollout_batch_size):
            batch = members[start : start + setup.config.rollout_batch_size]
            together = torch.tensor([prompts[i] for i in batch])  # (B, T)
            said = greedy(model.model, vectors, together, model.params)
            found.update(zip(batch, said, strict=True))
    return [answer(*found[i], model.params, setup.chat) for i in range(len(cases))]


@torch.no_grad()
def greedy(
    model: torch.nn.Module,
    vectors: Tensor,  # (P, D)
    prompt_ids: Tensor,  # (B, T), without pads
    params: SamplingParams,
) -> list[tuple[list[int], str]]:
    """The likeliest next tokens, one after another, up to what ends each row; and why it ended."""
    assert params.temperature == 0
    lm: Any = causal_lm(model)
    eos = eos_token_ids(lm)
    ends = torch.tensor(eos, device=lm.device)
    embedded = lm.get_input_embeddings()(prompt_ids.to(lm.device))  # (B, T, D)
    front = vectors.to(embedded).expand(len(prompt_ids), -1, -1)
    given: dict[str, Any] = {"inputs_embeds": torch.cat([front, embedded], 1)}
    tokens: list[Tensor] = []
    ended = torch.zeros(len(prompt_ids), dtype=torch.bool, device=lm.device)
    for _ in range(params.max_completion_tokens):
        out = lm(**given, use_cache=True, **last_logits(lm))
        tokens.append(out.logits[:, -1].argmax(-1))
        ended |= torch.isin(tokens[-1], ends)
        if ended.all():
            break
        given = {"input_ids": tokens[-1][:, None], **cache_argument(lm, cache_of(out))}
    return [params.finished(row, eos) for row in torch.stack(tokens, 1).tolist()]
