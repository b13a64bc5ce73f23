"""What a run takes of a disk: at its peak, and when it has ended."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from opcd.config import TrainConfig
from opcd.models.files import ModelFiles

# Of what is small, as measured.
RECORD_BYTES = 270  # of a tensor in trainer.pt beside its numbers
HEADER_BYTES = 100  # of a tensor in a safetensors file
STEP_BYTES = 570  # of a step in metrics.jsonl
CASE_BYTES = 340  # of a test request in answers.jsonl
REPORT_BYTES = 141_000  # of settings, scorecard, evidence, report.md with its curve, report.html


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


def disk(sizes: Sizes, config: TrainConfig, validation: int, test: int) -> Disk:
    """What a run's checkpoints and its model take, with so many labelled requests.

    At the most, the best checkpoint is none of the newest and is kept beside them.
    """
    due = {config.steps, *range(config.save_every, config.steps, config.save_every)}
    if validation:
        due |= set(range(config.validate_every, config.steps, config.validate_every))
    kept = [_kept(saved, config, validation > 0, sizes) for saved in range(len(due) + 1)]
    peak = max([kept[-1] + sizes.final, *(before + sizes.whole for before in kept[:-1])])
    metrics = config.steps * STEP_BYTES
    last = sizes.whole if config.schedule == "constant" else 0
    report = REPORT_BYTES + test * CASE_BYTES if test else 0
    return Disk(peak + metrics, sizes.final + last + metrics + report)


def _kept(saved: int, config: TrainConfig, validates: bool, sizes: Sizes) -> int:
    """What so many checkpoints are rotated to."""
    if not saved:
        return 0
    others = min(saved, config.keep_checkpoints + validates) - 1
    return sizes.whole + others * sizes.weights
