"""Whether the served model is the measured model: the same requests, the same likeliest answers.

Two programs that multiply in another order differ by rounding, and where two tokens are as likely
as each other, either may come first. In float32, where rounding is a ten-thousandth, every answer
that differs must differ first where both programs find the two tokens within `NEAR` of each other.
In 16 bits logits between 16 and 32 are multiples of 0.125, and every layer rounds: where answers
differ first is counted there, within `NEAR` or two units in the last place, and nothing is made of
it. In both, the log-probabilities of what was answered must lie where rounding puts them (`apart`),
and both programs must be as right (McNemar's test).
"""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from opcd.errors import InputError
from opcd.evaluation.contenders import Answer, LoadedModel, load_for_answers
from opcd.evaluation.contenders import answer as read_answer
from opcd.evaluation.decoding import greedy_params
from opcd.evaluation.intervals import CHANCE, mcnemar
from opcd.evaluation.server import ANSWER_S, AT_ONCE, Server
from opcd.models.head import head_of
from opcd.passes.hidden import completion_rows, scored_hidden
from opcd.serving.apart import NEAR, Apart, apart, token_logprobs, unit_at
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case

EXACT: Literal["float32"] = "float32"
UNITS = 2  # in the last place: one of each logit
ENDED = -1  # where an answer has no token any more
LIKELIEST = 20  # tokens of which a server gives the log-probability, at each place


class Served(NamedTuple):
    """What a server made of a request."""

    prompt_ids: list[int]
    token_ids: list[int]
    finish: str
    logprobs: list[dict[int, float]]  # of the likeliest tokens at each place, by their ids


class Differing(NamedTuple):
    """Where an answer differs first."""

    request: int  # which of them
    place: int  # in the answer, from 0
    ours: int  # the token of transformers
    theirs: int  # of the server
    our_margin: float | None  # logit of ours over theirs, by transformers; None where one has ended
    their_margin: float | None  # of theirs over ours, by the server; None: not among its likeliest
    unit: float = 0.0  # in the last place of the larger logit, in the dtype that is served

    @property
    def near(self) -> bool:
        """Whether both programs find the two as likely as rounding of logits can tell."""
        most = max(NEAR, UNITS * self.unit)
        return (
            self.our_margin is not None
            and abs(self.our_margin) <= most
            and self.their_margin is not None
            and abs(self.their_margin) <= most
        )


class Same(NamedTuple):
    """A served model against the one that was exported."""

    dtype: str
    requests: int
    other_prompts: int  # requests that the server turned into other tokens
    differing: list[Differing]
    apart: Apart
    only_ours: int  # requests that transformers alone answers right; 0 without accepted answers
    only_theirs: int
    p_value: float | None  # McNemar's; None where nothing says what is right

    @property
    def agrees(self) -> bool:
        """Whether nothing but rounding is between them."""
        return (
            not self.other_prompts
            and self.apart.agrees
            and (self.dtype != EXACT or all(place.near for place in self.differing))
            and (self.p_value is None or self.p_value > CHANCE)
        )

    @property
    def line(self) -> str:
        """For people."""
        equal = self.requests - len(self.differing)
        found = (
            f"in {self.dtype} {equal} of {self.requests} greedy answers are those of transformers, "
            f"token by token"
        )
        if self.other_prompts:
            found += f"; {self.other_prompts} requests were turned into OTHER TOKENS by the server"
        if self.differing:
            near = sum(place.near for place in self.differing)
            units = "" if self.dtype == EXACT else ", or two units in the last place,"
            found += (
                f", {near} of the {len(self.differing)} others differ first where both programs "
                f"have the two tokens within {NEAR}{units} of each other"
            )
        found += f"; {self.apart.words}"
        if self.p_value is not None:
            found += (
                f"; right by one alone: transformers {self.only_ours}, the server "
                f"{self.only_theirs} (McNemar p {self.p_value:.2g})"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            **self._asdict(),
            "agrees": self.agrees,
            "apart": {**self.apart._asdict(), "agrees": self.apart.agrees},
            "differing": [{**d._asdict(), "near": d.near} for d in self.differing],
        }


def in_float32(setup: Setup) -> Setup:
    """The same, with passes in float32."""
    config = replace(setup.config, dtype=EXACT)
    return setup._replace(config=config, dtype=torch.float32)


def served_answers(server: Server, cases: Sequence[Case], setup: Setup) -> list[Served]:
    """Greedy answers without the context, with their tokens and log-probabilities.

    Raises InputError for a server that does not give them, as vLLM does.
    """
    config, chats = setup.config, setup.chats
    bodies = [
        json.dumps(
            {
                "model": server.model,
                "messages": chats[case.prompt.context].student_messages(case.example.messages),
                "max_tokens": config.max_completion_tokens,
                "temperature": 0.0,
                "logprobs": True,
                "top_logprobs": LIKELIEST,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                # Behind an adapter a server knows of the base's ends alone.
                "stop_token_ids": setup.stop_ids,
                **({"stop": list(config.stop)} if config.stop else {}),
                **(
                    {"chat_template_kwargs": config.chat_template_args}
                    if config.chat_template_args
                    else {}
                ),
            }
        ).encode()
        for case in cases
    ]

    def asked(body: bytes) -> Served:
        return _served(server.read("/chat/completions", body, ANSWER_S), server)

    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(asked, bodies))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _served(found: Any, server: Server) -> Served:
    try:
        (choice,) = found["choices"]
        places = (choice["logprobs"] or {})["content"]
        return Served(
            list(map(int, found["prompt_token_ids"])),
            list(map(int, choice["token_ids"])),
            "length" if choice["finish_reason"] == "length" else "stop",
            [{_id(x["token"]): float(x["logprob"]) for x in at["top_logprobs"]} for at in places],
        )
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{server.base_url} must answer with token ids and log-probabilities, as vLLM does, "
            f"got none ({type(error).__name__}: {error}); is it another server?"
        ) from error


def _id(token: str) -> int:
    """Of ``token_id:17``."""
    return int(token.removeprefix("token_id:"))


def compared(model: str, cases: Sequence[Case], served: Sequence[Served], setup: Setup) -> Same:
    """A model's own answers, by its name or folder, against those of a server.

    The model is loaded here in the dtype of `setup`, the server's, then in float32, and gone at the
    end. Raises InputError for tokens that it does not have.
    """
    params = greedy_params(setup)
    dtype, prompts = setup.config.dtype, [case.prompt for case in cases]
    completions = [s.token_ids[: params.max_completion_tokens] for s in served]
    loaded = load_for_answers(setup, model, params)
    try:
        _check_tokens(completions, len(head_of(loaded.model).weight))
        answers = loaded.alone(cases)
        differing = _differing(loaded, cases, answers, served)
        ours = token_logprobs(loaded, prompts, completions)
    finally:
        loaded.engine.close()
    del loaded
    theirs = [
        s.logprobs[i].get(token, math.nan) if i < len(s.logprobs) else math.nan
        for s, ids in zip(served, completions, strict=True)
        for i, token in enumerate(ids)
    ]
    exact = None
    if dtype != EXACT:
        loaded = load_for_answers(in_float32(setup), model, params)
        try:
            exact = token_logprobs(loaded, prompts, completions)
        finally:
            loaded.engine.close()
    found = apart(theirs, ours, exact)
    other = sum(p.student_ids != s.prompt_ids for p, s in zip(prompts, served, strict=True))
    # What a prompted teacher has said is not asked again.
    if not setup.task.judges(cases) or setup.task.scorer.hears_teacher:
        return Same(dtype, len(cases), other, differing, found, 0, 0, None)
    said = [read_answer(s.token_ids, s.finish, params, setup.chat) for s in served]
    right, theirs_right = (_values(cases, given, setup) for given in (answers, said))
    pairs = list(zip(right, theirs_right, strict=True))
    only_ours, only_theirs = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    p_value = mcnemar(only_ours, only_theirs)
    return Same(dtype, len(cases), other, differing, found, only_ours, only_theirs, p_value)


def _check_tokens(completions: Sequence[Sequence[int]], vocab_size: int) -> None:
    wrong = [t for ids in completions for t in ids if not 0 <= t < vocab_size]
    if wrong:
        raise InputError(
            f"a server must answer with tokens of the model's {vocab_size}, got {wrong[0]}; is it "
            f"another model's server?"
        )


def _values(cases: Sequence[Case], answers: Sequence[Answer], setup: Setup) -> list[float]:
    """How right each answer is."""
    scorer = setup.task.scorer
    return [
        scorer(a.text, case.example.answers, a.raw, case.example.messages).value
        for a, case in zip(answers, cases, strict=True)
    ]


def _differing(
    loaded: LoadedModel,
    cases: Sequence[Case],
    answers: Sequence[Answer],
    served: Sequence[Served],
) -> list[Differing]:
    found = []
    for i, (answer, theirs) in enumerate(zip(answers, served, strict=True)):
        place = _first_difference(answer.token_ids, theirs.token_ids)
        if place is None:
            continue
        own, other = (
            ids[place] if place < len(ids) else ENDED
            for ids in (answer.token_ids, theirs.token_ids)
        )
        ours, unit = None, 0.0
        if ENDED not in (own, other):
            logits = _logits(loaded, cases[i].prompt.student_ids, answer.token_ids[: place + 1])
            first, second = logits[own].item(), logits[other].item()
            ours, unit = first - second, unit_at(max(first, second, key=abs), loaded.setup.dtype)
        likely = theirs.logprobs[place] if place < len(theirs.logprobs) else {}
        known = own in likely and other in likely
        margin = likely[other] - likely[own] if known else None
        found.append(Differing(i, place, own, other, ours, margin, unit))
    return found


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place at which two answers differ; None where they are the same.

    Both end with the token that ended them, or have as many as they may.
    """
    pairs = enumerate(zip_longest(ours, theirs, fillvalue=ENDED))
    return next((i for i, (a, b) in pairs if a != b), None)


@torch.inference_mode()
def _logits(
    loaded: LoadedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int]
) -> Tensor:  # (V,) fp32
    """Those that predict the last token of a completion; the product with the head in fp32."""
    model, head = loaded.model, head_of(loaded.model)
    rows = completion_rows([prompt_ids], [completion_ids])
    hidden = scored_hidden(model, rows, takes_cache=loaded.plan.shares_prefix)[-1]
    logits = head.weight.float() @ hidden.float()
    if head.bias is not None:
        logits = logits + head.bias.float()
    return head.softcap * (logits / head.softcap).tanh() if head.softcap else logits
