"""What a completion draws: a function of its own number and of nothing else.

Each token takes one uniform number, a hash of its completion's stream and its position, and is the
entry at which that number falls in the running sum of the probabilities. A stream is a hash of the
run's seed, the step, the prompt and the sample's number. So the engine, the batch, the order, the
rank and the calls before leave a draw as it is, and a resumed run needs no generator's state.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from opcd.episodes import Prompt

# The steps of draws that belong to none.
HELD_OUT = -1  # what is measured
GUIDED = -2  # what the teacher writes: whenever that is
ATTEMPTS = -1000  # and below: the attempts of a round, and what is written down about them
BLOCK = 256  # entries of the vocabulary in one term of the outer sum

# splitmix64 (Steele, Lea and Flood, 2014), as signed 64-bit numbers.
_GAMMA, _MIX_1, _MIX_2 = (
    x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def streams(seed: int, step: int, prompts: Sequence[Prompt], n: int = 1) -> list[int]:
    """A number for each of n completions of each prompt, those of one prompt together.

    Where a prompt comes again, its samples go on counting.
    """
    counts: Counter[int] = Counter()
    found = []
    for prompt in prompts:
        key = prompt.key
        for _ in range(n):
            text = f"{seed} {step} {key} {counts[key]}"
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            found.append(int.from_bytes(digest, "little", signed=True))
            counts[key] += 1
    return found


def of_turn(numbers: Sequence[int], turn: int) -> list[int]:
    """A number for a turn of each conversation, of those that belong to the conversations."""
    found = []
    for number in numbers:
        digest = hashlib.blake2b(f"{number} {turn}".encode(), digest_size=8).digest()
        found.append(int.from_bytes(digest, "little", signed=True))
    return found


def uniforms(
    stream: Tensor,  # (B,) int64
    position: Tensor | int,  # (B,) int64: how many tokens the completion has so far
) -> Tensor:  # (B,) fp64, multiples of 2⁻⁵³ in [0, 1)
    """The number that each completion's next token takes."""
    count = torch.zeros_like(stream) + position + 1
    x = stream + count * _GAMMA  # products wrap around
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() * 2.0**-53


def drawn(
    logits: Tensor,  # (B, V) fp32
    uniform: Tensor,  # (B,) fp64
    temperature: float | Tensor,  # (): positive
) -> Tensor:  # (B,) int64
    """The tokens at which `uniform` falls in the running sums of softmax(logits / temperature).

    The sum has two levels, blocks and entries of one block, and within the block the number is
    scaled to what the entries sum to: each token comes as often as its fp32 probability says,
    also where that is 1e-30. Nothing waits for the device, and every sum has a fixed order.
    """
    # Of 49k logits a row each copy counts: nothing is divided by 1, and nothing padded by 0.
    scaled = isinstance(temperature, Tensor) or temperature != 1
    p = torch.softmax(logits / temperature if scaled else logits, -1)
    if missing := -p.shape[1] % BLOCK:
        p = pad(p, (0, missing))
    p = p.unflatten(1, (-1, BLOCK))  # (B, blocks, BLOCK)
    block, rest = _located(p.sum(-1), uniform)
    entries = p.gather(1, block[:, None, None].expand(-1, 1, BLOCK))[:, 0]  # (B, BLOCK)
    entry, _ = _located(entries, rest)
    return block * BLOCK + entry


def truncated(
    logits: Tensor,  # (B, V) fp32
    temperature: float | Tensor,  # (): positive
    top_k: int | Tensor,  # (): 0 for all
    top_p: float | Tensor,  # (): 1 for all
) -> Tensor:  # (B, V): -inf for what is not drawn
    """Logits of the head of softmax(logits / temperature) alone.

    First the `top_k` likeliest, of equal ones those of lower number; of what these hold, as a
    distribution of their own, the fewest likeliest that reach `top_p`. `drawn` takes the rest for
    the whole: renormalised by its sum. Summed in fp64, in the two levels of `drawn`: only blocks
    are summed up, and the entries of the one in which `top_p` is reached. top_p 1 leaves out
    nothing, whatever rounding makes of the sum.
    """
    scaled = logits / temperature
    ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
    k = torch.as_tensor(top_k, device=logits.device)
    p = torch.as_tensor(top_p, dtype=torch.float64, device=logits.device)
    v = logits.shape[1]
    number = torch.arange(v, device=logits.device)
    most = torch.where(k == 0, v, k.clamp(max=v))
    relative = ordered.masked_fill(number >= most, -torch.inf).double()
    weights = relative.sub_(relative[:, :1].clone()).exp_()
    weights = pad(weights, (0, -v % BLOCK)).unflatten(1, (-1, BLOCK))  # (B, blocks, BLOCK)
    sums = weights.sum(-1)
    ends = _running_sums(sums)
    target = p * ends[:, -1:]
    starts = pad(ends[:, :-1], (1, 0))
    block = (starts < target).sum(-1, keepdim=True).sub_(1).clamp_(min=0)  # (B, 1)
    entries = weights.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0]  # (B, BLOCK)
    in_front = starts.gather(1, block) + pad(_running_sums(entries)[:, :-1], (1, 0))
    count = block * BLOCK + (in_front < target).sum(-1, keepdim=True)
    count = torch.where(p >= 1, most, torch.minimum(count, most)).clamp(min=1)
    # The last of them, in the order of the vocabulary: those above it, and equal ones before it.
    last, place = (x.gather(1, count - 1) for x in (ordered, index))
    keep = (scaled > last) | ((scaled == last) & (number <= place))
    return logits.masked_fill(~keep, -torch.inf)


def _located(terms: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of terms, the one where `uniform` of their sum falls, and how far into it.

    A term of 0 is never the one: rounding may carry the number to the end of the last term that
    is larger, and there it stays.
    """
    terms = terms.double()
    ends = _running_sums(terms)
    target = (uniform * ends[:, -1])[:, None]
    index = torch.arange(terms.shape[1], device=terms.device)
    last = torch.where(terms > 0, index, 0).amax(-1)
    found = torch.minimum((ends <= target).sum(-1), last)[:, None]
    term = terms.gather(1, found)
    start = ends.gather(1, found) - term
    return found[:, 0], ((target - start) / term).clamp(0, 1)[:, 0]


def _running_sums(x: Tensor) -> Tensor:
    return x.cumsum(-1) if x.device.type == "cpu" else shifted_sums(x)


def shifted_sums(x: Tensor) -> Tensor:
    """cumsum over the last dimension, which CUDA's does not do under deterministic algorithms."""
    shift = 1
    while shift < x.shape[-1]:
        x = x + pad(x[..., :-shift], (shift, 0))
        shift *= 2
    return x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: torch's own shift brings the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
