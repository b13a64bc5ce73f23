"""Prompt tuning by peft (Lester et al., 2021): vectors in front of requests, and nothing else.

They are trained on what the prompted teacher says, as off-policy distillation is, in the same order
of prompts; they begin as the embeddings of the context's first tokens.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model

from opcd.config.rate import rate_factor
from opcd.episodes import Episode
from opcd.evaluation.decoding import rollout_params
from opcd.models.by_name import ADAPTER_CONFIG
from opcd.models.lm import autocast, causal_lm
from opcd.runtime.batches import batches_by_tokens
from opcd.runtime.files import write_json
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import Setup
from opcd.training.guided import StoredCompletions
from opcd.training.sources import PartlyGuided

RATE = 1e-2  # of AdamW, for vectors of the size of embeddings; not chosen by measurement


def train_soft_prompt(
    setup: Setup,
    completions: Path,  # a run's guided.jsonl, with a completion for each prompt of the steps
    tokens: int,
    folder: Path,  # of peft's files
    progress: Progress,
) -> tuple[float, int]:
    """Cross-entropy on the teacher's completions; returns seconds of its steps, and tokens seen.

    As many steps, prompts and completions as the configuration says, which has a guided_share of 1.
    The context must have as many tokens at least.
    """
    config, front = setup.config, setup.task.a_prefix
    assert config.guided_share == 1
    assert len(front) >= tokens
    torch.manual_seed(config.seed)
    base = setup.load(config.model, torch.float32)
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    model: Any = get_peft_model(base, tuning)
    vectors = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        ids = torch.tensor(front[:tokens], device=vectors.device)
        vectors.copy_(causal_lm(model).get_input_embeddings()(ids))
    source = PartlyGuided(
        setup.task.conversations,
        config,
        rollout_params(setup),
        StoredCompletions(stored(completions)),
    )
    optimizer = torch.optim.AdamW([vectors], lr=RATE, weight_decay=0.0)
    begin, seen = time.perf_counter(), 0
    progress.begin(f"soft prompt of {tokens}", config.steps)
    for step in range(config.steps):
        episodes = source.episodes(step, None)  # type: ignore[arg-type]  # nothing is sampled
        count = sum(e.scored_tokens for e in episodes)
        loss = _backward(model, episodes, count, setup)
        torch.nn.utils.clip_grad_norm_([vectors], config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_factor(step, config)
        optimizer.step()
        optimizer.zero_grad()
        seen += count
        progress.part(f"cross-entropy {loss:.3f}")
    progress.end()
    seconds = time.perf_counter() - begin
    model.save_pretrained(folder, save_embedding_layers=False)
    named = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    write_json(folder / ADAPTER_CONFIG, named | {"base_model_name_or_path": config.model})
    return seconds, seen


def stored(file: Path) -> dict[int, list[list[int]]]:
    """The completions of a run's guided.jsonl by their prompts' keys, in the order of samples."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()][1:]
    found: dict[int, list[list[int]]] = {}
    for row in sorted(rows, key=lambda row: row["sample"]):
        found.setdefault(row["key"], []).append(row["completion_token_ids"])
    return found


def _backward(model: Any, episodes: list[Episode], count: int, setup: Setup) -> float:
    """The gradient of the mean over all scored tokens of a step; returns that mean."""
    device, total = setup.device, 0.0
    sizes = [len(e.student_ids) for e in episodes]
    for batch in batches_by_tokens(sizes, setup.config.max_tokens_per_pass):
        width = max(sizes[i] for i in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)  # (B, T), pads behind
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, i in enumerate(batch):
            episode = episodes[i]
            tokens = torch.tensor(list(episode.student_ids))
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            for start, length in episode.student_spans:
                labels[row, start : start + length] = tokens[start : start + length]
        with autocast(device, setup.dtype):
            out = model(input_ids=ids.to(device), attention_mask=mask.to(device))
        # Behind the vectors: the logits at each position predict the next one.
        logits = out.logits[:, -width:][:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten().to(device), reduction="sum"
        )
        (loss / count).backward()
        total += loss.item() / count
    return total
