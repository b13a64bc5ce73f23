"""What a server takes for requests: alone, and several under way; a warm-up is left out."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from statistics import median
from typing import Any, NamedTuple, TypeVar

from opcd.evaluation.server import Server
from opcd.serving.spread import Spread, extremes, quartiles
from opcd.serving.stream import Timed, body_of, takes_one_length, timed
from opcd.tasks.messages import Message

T = TypeVar("T")
AT_ONCE = (1, 4, 16)  # requests under way, where throughput is measured
ROUNDS = 3  # of each
ALONE_TOKENS = 16  # of an answer, or more: a time a token is the mean of as many as there are
ALONE_SHARE = 0.35  # of a contender's time


class Load(NamedTuple):
    """Requests under way, and how many ended in a second."""

    at_once: int
    requests_per_s: Spread  # of rounds
    requests: int  # in all rounds


class Figures(NamedTuple):
    """What one contender takes of a server."""

    first_s: Spread  # to the first token, of a request that comes alone
    each_s: Spread | None  # for a token behind it; None where answers have one
    prompt_tokens: float  # medians
    cached_tokens: float | None
    answer_tokens: float  # of the requests under load
    loads: list[Load]

    @property
    def best(self) -> Load:
        """The load at which most requests end in a second."""
        return max(self.loads, key=lambda load: load.requests_per_s.median)

    @property
    def device_s(self) -> Spread:
        """Seconds of the device a request, where as many are under way as serve it best."""
        rate = self.best.requests_per_s
        return Spread(1 / rate.median, 1 / rate.high, 1 / rate.low, rate.n)


class Asking(NamedTuple):
    """How servers are asked, all of them alike."""

    answer_tokens: int  # of a request under load
    template_args: Mapping[str, Any]
    alone: int  # requests, one after the other
    seconds: float = 150.0  # for one contender; at least one round of each load is made
    at_once: Sequence[int] = AT_ONCE


def measured(
    server: Server,
    requests: Sequence[Sequence[Message]],
    asking: Asking,
    tell: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Ask a server the requests in turn, from the first again where they are too few.

    Raises InputError for a server that does not stream answers with their counts.
    """
    one_length = takes_one_length(server, requests[0])
    following = cycle(requests)

    def bodies(count: int, tokens: int) -> list[bytes]:
        return [
            body_of(server, messages, tokens, asking.template_args, one_length)
            for messages in islice(following, count)
        ]

    most = max(asking.at_once)
    _together(server, bodies(most + 2, asking.answer_tokens), most)
    tell("warm-up")
    began = time.monotonic()
    longer = max(asking.answer_tokens, ALONE_TOKENS)
    deadline = began + ALONE_SHARE * asking.seconds
    alone = list(_until(deadline, (timed(server, b) for b in bodies(asking.alone, longer))))
    tell("alone")
    loads, answers = [], []
    for i, at_once in enumerate(asking.at_once):
        left = began + asking.seconds - time.monotonic()
        deadline = time.monotonic() + left / (len(asking.at_once) - i)
        rates, count = [], max(4, 2 * at_once)
        for done, took in _until(
            deadline,
            (_round(server, bodies(count, asking.answer_tokens), at_once) for _ in range(ROUNDS)),
        ):
            rates.append(count / took)
            answers += done
        loads.append(Load(at_once, extremes(rates), count * len(rates)))
        tell(f"{at_once} at once")
    each = [x.each_s for x in alone if x.each_s is not None]
    cached = any(x.cached_tokens is not None for x in alone)
    return Figures(
        quartiles([x.first_s for x in alone]),
        quartiles(each) if each else None,
        median(x.prompt_tokens for x in [*alone, *answers]),
        # Servers that count them leave the count out where it is 0.
        median(x.cached_tokens or 0 for x in alone) if cached else None,
        median(x.completion_tokens for x in answers),
        loads,
    )


def _round(server: Server, bodies: Sequence[bytes], at_once: int) -> tuple[list[Timed], float]:
    """Requests of which so many are under way, and how long all of them took."""
    began = time.perf_counter()
    done = _together(server, bodies, at_once)
    return done, time.perf_counter() - began


def _together(server: Server, bodies: Sequence[bytes], at_once: int) -> list[Timed]:
    pool = ThreadPoolExecutor(at_once)
    try:
        return list(pool.map(lambda body: timed(server, body), bodies))
    finally:  # nobody waits for what an interrupted server still answers
        pool.shutdown(wait=False, cancel_futures=True)


def _until(deadline: float, made: Iterator[T]) -> Iterator[T]:
    """What is made until then; the first in any case."""
    for one in made:
        yield one
        if time.monotonic() > deadline:
            return
