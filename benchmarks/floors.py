"""The least time that work can take, by a fixed formula: a yardstick beside what was measured.

Each part of the work (`Work`) multiplies matrices, at the rate of a large product, while it moves
memory, at the rate of a triad: the slower of the two is its time, and parts add up. Counted is what
the method asks for, and not what a program makes of it:

    a pass      2 operations a weight of the body's linear layers and token, 4 a head's width and
                pair of tokens that attend one another; three times that with gradients
    the head    4 products of tokens, width and vocabulary where it is trained, 3 where it is frozen
    decoding    a token: the weights read once for all rows, and the keys and values of each row
    optimizer   a trained weight, in fp32: its gradient written and read, itself and both moments
                read and written: 32 bytes

Recomputation, copies, casts, norms, embeddings, sampling and launches are not in it.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.problems import Problem, Sizes
from benchmarks.rates import Rates

OPTIMIZER_BYTES = 32  # a trained weight


class Work(NamedTuple):
    """Products and memory traffic that happen at the same time."""

    flops: float
    bytes: float = 0.0


def floor_s(parts: Iterable[Work], rates: Rates) -> float:
    """Seconds of parts that follow one another."""
    return sum(max(part.flops / rates.flops, part.bytes / rates.bytes) for part in parts)


def forward(sizes: Sizes, sequences: Sequence[tuple[int, int]]) -> Work:
    """A pass of the body over sequences of (new tokens, tokens in front of them)."""
    tokens = sum(new for new, _ in sequences)
    pairs = sum(new * before + new * (new + 1) / 2 for new, before in sequences)
    return Work(2 * sizes.body * tokens + 4 * sizes.attended * pairs)


def loss(
    tokens: int, d: int, v: int, trained: bool, itemsize: int = 2, into_grad: bool = False
) -> Work:
    """Loss and gradients of one head: both heads read, the gradient of a trained one written.

    `into_grad`: a step's head in fp32, whose gradient is added to one that is there.
    """
    products = 4 if trained else 3
    heads = v * d * ((4 + itemsize) if into_grad else (1 + trained) * itemsize)
    gradient = v * d * (8 if into_grad else itemsize) if trained else 0
    return Work(products * 2 * tokens * d * v, heads + gradient)


def decoding(sizes: Sizes, rows: int, prompt: int, completion: int, itemsize: int) -> list[Work]:
    """Completions of as many rows: the prompts but their last token, then a token a row at a time.

    Prompts and completions are counted in tokens, and have one length each.
    """
    parts = [forward(sizes, [(prompt - 1, 0)] * rows)]
    for held in range(prompt, prompt + completion):
        flops = rows * (2 * (sizes.body + sizes.head) + 4 * sizes.attended * held)
        read = (sizes.body + sizes.head + rows * sizes.kept * held) * itemsize
        parts.append(Work(flops, read))
    return parts


def phases(problem: Problem, sizes: Sizes, itemsize: int) -> dict[str, list[Work]]:
    """The parts of each phase of a step (`bench_step.py`), by its name.

    The teacher's product with its head is the update's.
    """
    rows, new = problem.completions, problem.prompt + problem.completion - 1
    tokens = rows * problem.completion
    passed = forward(sizes, [(new, 0)] * rows)
    head = Work(4 * 2 * tokens * sizes.head)
    return {
        "rollout": decoding(sizes, rows, problem.prompt, problem.completion, itemsize),
        "teacher": [forward(sizes, [(new, problem.context)] * rows)],
        "update": [
            Work(3 * passed.flops),
            head,
            Work(0, OPTIMIZER_BYTES * sizes.trained),
        ],
    }
