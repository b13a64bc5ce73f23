"""What a run takes of a disk: at its peak, and when it has ended."""

import json
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.config import TrainConfig
from opcd.evaluation.leak import REQUESTS
from opcd.models.files import ModelFiles
from opcd.tasks.data import Example
from opcd.tasks.elsewhere import ANSWER_TOKENS
from opcd.tasks.messages import asked
from opcd.tasks.prepare import Setup

# Of what is small, as measured.
RECORD_BYTES = 270  # of a tensor in trainer.pt beside its numbers
HEADER_BYTES = 100  # of a tensor in a safetensors file
STEP_BYTES = 600  # of a step in metrics.jsonl
VALIDATION_BYTES = 700  # of a validation there
REPORT_BYTES = 141_000  # of settings, scorecard, evidence, report.md with its curve, report.html
TOKEN_BYTES = 3.5  # of a token of an answer
# Beside their texts: an answer in answers.jsonl, a line of answers.csv, a request elsewhere, and an
# answer to a request to reveal the context.
ANSWER_BYTES, LINE_BYTES, ELSEWHERE_BYTES, LEAK_BYTES = 80, 45, 135, 130
NATS_BYTES, NUMBER_BYTES = 127, 20  # of what agreement is made from, and of each token there


class Disk(NamedTuple):
    """Bytes in output_dir."""

    peak: int
    end: int


class Sizes(NamedTuple):
    """Bytes of what a run writes."""

    weights: int  # of a checkpoint that is a model to look at
    whole: int  # of one that a run continues from
    final: int

    @classmethod
    def of(
        cls, base: ModelFiles | torch.nn.Module, trained: Iterable[Tensor], adapter: bool
    ) -> "Sizes":
        """Of a run that trains these tensors, beginning with the model of the files.

        For files that are not there yet, their model stands in, in the dtype that they have.
        """
        if isinstance(base, ModelFiles):
            shapes = [slot.shape for slot in base.slots.values()]
            small, final = sum(file.stat().st_size for file in base.small_files), base.nbytes
        else:
            tensors = {id(t): t for t in base.state_dict().values()}.values()
            shapes = [tuple(t.shape) for t in tensors]
            small, final = 0, sum(t.nbytes for t in tensors)
        parameters = list(trained)
        own = sum(p.nbytes for p in parameters)
        state = 2 * own + 3 * len(parameters) * RECORD_BYTES
        if adapter:
            weights = own + len(parameters) * HEADER_BYTES
            return cls(weights, weights + state, final + weights)
        numbers = sum(map(math.prod, shapes))
        weights = small + numbers * torch.float32.itemsize + len(shapes) * HEADER_BYTES
        return cls(weights, weights + state, final)


def disk(sizes: Sizes, setup: Setup) -> Disk:
    """What a run's checkpoints, its model and its report take.

    At the most, the best checkpoint is none of the newest and is kept beside them.
    """
    config, validates = setup.config, bool(setup.task.validation)
    due = {config.steps, *range(config.save_every, config.steps, config.save_every)}
    validations = {*range(0, config.steps, config.validate_every), config.steps}
    if validates:
        due |= validations - {0}
    kept = [_kept(saved, config, validates, sizes) for saved in range(len(due) + 1)]
    peak = max([kept[-1] + sizes.final, *(before + sizes.whole for before in kept[:-1])])
    metrics = config.steps * STEP_BYTES + validates * len(validations) * VALIDATION_BYTES
    last = sizes.whole if config.schedule == "constant" else 0
    return Disk(peak + metrics, sizes.final + last + metrics + scored_bytes(setup))


def scored_bytes(setup: Setup) -> int:
    """Of a scorecard, its report and every answer behind it, each answer at its limit."""
    config, task = setup.config, setup.task
    if not task.test:
        return 0
    answer = config.max_completion_tokens * TOKEN_BYTES
    contenders = 4 + bool(config.teacher)
    found = REPORT_BYTES + contenders * len(task.scored) * (ANSWER_BYTES + answer)
    for case in task.scored:
        found += _request_bytes(case.example, contenders, answer)
    held_out = min(len(task.test), config.divergence_prompts)
    found += 2 * held_out * (NATS_BYTES + config.max_completion_tokens * NUMBER_BYTES)
    answer = ANSWER_TOKENS * TOKEN_BYTES
    for request in setup.elsewhere:
        found += ELSEWHERE_BYTES + 2 * answer + _request_bytes(request.example, 2, answer)
    if config.leak_tokens:  # of base and distilled model, and of the prompted one for each context
        asked_of = len(REQUESTS) * (2 + len(task.prefixes))
        found += asked_of * (LEAK_BYTES + config.leak_tokens * TOKEN_BYTES)
    return round(found)


def _request_bytes(example: Example, contenders: int, answer: float) -> float:
    """Of a request in JSON, and of a line of answers.csv for what each contender answered."""
    whole = len(json.dumps([*example.messages])) + len(json.dumps([*example.answers]))
    read = len(asked(example.messages).encode()) + len(" | ".join(example.answers).encode())
    return whole + contenders * (LINE_BYTES + read + answer)


def _kept(saved: int, config: TrainConfig, validates: bool, sizes: Sizes) -> int:
    """What so many checkpoints are rotated to."""
    if not saved:
        return 0
    others = min(saved, config.keep_checkpoints + validates) - 1
    return sizes.whole + others * sizes.weights
