"""Whether pads in front of a prompt leave a model's next token alone, found out by a trial.

Masked pads should: nobody attends them, and positions are counted without them. Some models count
slots of the cache instead, compress blocks of it, or add positions of their own.
"""

import logging
from statistics import fmean
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from opcd.models.lm import causal_lm, eos_token_ids, vocabulary_rows
from opcd.passes.agreement import NEGLIGIBLE, rounded_embeddings
from opcd.rollouts.generate_call import generated
from opcd.rollouts.protocol import SamplingParams

log = logging.getLogger(__name__)

LENGTHS = 21, 8, 13  # of the rows: a batch of them has pads
TIMES_NOISE = 16  # of three tokens: what rounding makes of them varies much
NOISE_PASSES = 2

_FOUND: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # by the causal LM


def pads_are_neutral(model: torch.nn.Module) -> bool:
    """Whether rows with pads in front say what each says alone, as far as rounding lets it.

    It is tried once for a model; where they do not, that is said.
    """
    lm = causal_lm(model)
    if lm not in _FOUND:
        _FOUND[lm] = _tried(model)
    return _FOUND[lm]


@torch.no_grad()
def _tried(model: torch.nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = vocabulary_rows(model)
    prompts = [torch.randint(rows, (n,), generator=generator).tolist() for n in LENGTHS]
    alone = [_next(model, [prompt]) for prompt in prompts]
    gap = _nats(torch.cat(alone), _next(model, prompts))
    if gap <= NEGLIGIBLE:
        return True
    with rounded_embeddings(model):
        again = [torch.cat([_next(model, [p]) for p in prompts]) for _ in range(NOISE_PASSES)]
    bound = max(NEGLIGIBLE, TIMES_NOISE * fmean(_nats(torch.cat(alone), x) for x in again))
    if gap <= bound:
        return True
    log.warning(
        "prompts of one length alone are sampled together: pads in front move the next token of "
        "a %s by %.2g nats, and rounding explains %.2g",
        *(type(causal_lm(model)).__name__, gap, bound),
    )
    return False


def _next(model: torch.nn.Module, prompts: list[list[int]]) -> Tensor:  # (B, V), log p
    eos = eos_token_ids(model)
    ids = torch.full((len(prompts), max(map(len, prompts))), eos[0])
    mask = torch.zeros_like(ids)
    for row, kept, prompt in zip(ids, mask, prompts, strict=True):
        row[-len(prompt) :], kept[-len(prompt) :] = torch.tensor(prompt), 1
    params, streams = SamplingParams(1, 0.0), torch.zeros(len(prompts), dtype=torch.long)
    output = generated(model, ids, mask, None, eos, params, streams, logits=True)
    return output.logits[0].float().log_softmax(-1)


def _nats(expected: Tensor, found: Tensor) -> float:
    """The mean KL of both, a row."""
    return (expected.exp() * (expected - found)).sum(-1).mean().item()
