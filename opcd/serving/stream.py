"""One request to a server of chat completions, with the times at which its tokens came."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.evaluation.server import Server, said
from opcd.runtime.strict_json import parse_json
from opcd.tasks.messages import Message

ANSWER_S = 300.0  # for a whole answer
MOST_TOKENS = 1 << 32  # that a usage may count
# Beyond OpenAI's, as vLLM, SGLang and llama.cpp have it: answers of one length, each token of it
# as text. A server that refuses them answers as long as it does.
ONE_LENGTH = {"ignore_eos": True, "skip_special_tokens": False}


class Timed(NamedTuple):
    """A request's times, and what the server counted."""

    first_s: float  # from sending to the first token
    total_s: float  # to the last one
    prompt_tokens: int
    cached_tokens: int | None  # of the prompt; None where the server does not say
    completion_tokens: int

    @property
    def each_s(self) -> float | None:
        """Behind the first token, for each; None of a single one."""
        rest = self.completion_tokens - 1
        return (self.total_s - self.first_s) / rest if rest > 0 else None


def body_of(
    server: Server,
    messages: Sequence[Message],
    answer_tokens: int,
    template_args: Mapping[str, Any],
    one_length: bool,
) -> bytes:
    """A greedy request for an answer of at most so many tokens, to be streamed with its counts."""
    return json.dumps(
        {
            "model": server.model,
            "messages": list(messages),
            "max_tokens": answer_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **(ONE_LENGTH if one_length else {}),
            **({"chat_template_kwargs": dict(template_args)} if template_args else {}),
        }
    ).encode()


def takes_one_length(server: Server, messages: Sequence[Message]) -> bool:
    """Whether it takes requests for answers of one length."""
    url = f"{server.base_url}/chat/completions"
    with server.opened(url, body_of(server, messages, 1, {}, True), ANSWER_S) as response:
        for _ in server.pieces(response, ANSWER_S):
            pass
        return bool(response.status < 400)


def timed(server: Server, body: bytes) -> Timed:
    """Send a request, and read its answer to the end.

    Raises InputError for what is no stream of chat completions with its usage, and for an answer
    that takes longer than five minutes.
    """
    began = time.perf_counter()
    first = last = None
    usage: Mapping[str, Any] | None = None
    for event in _events(server, body, began + ANSWER_S):
        now = time.perf_counter()
        if _says(event.get("choices")):
            first, last = first or now, now
        usage = event.get("usage") or usage
    try:
        if first is None or last is None or usage is None:
            raise KeyError("usage" if usage is None else "content")
        details = usage.get("prompt_tokens_details") or {}
        prompt, cached = _count(usage["prompt_tokens"]), details.get("cached_tokens")
        return Timed(
            first - began,
            last - began,
            prompt,
            None if cached is None else _count(cached, prompt),
            _count(usage["completion_tokens"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{server.base_url} must stream answers with their text and their usage, got none: "
            f"{error}; is it a server of chat completions that takes stream_options?"
        ) from error


def _says(choices: Any) -> bool:
    """Whether a piece of an answer holds something that was generated."""
    listed = choices if isinstance(choices, list) else []
    deltas = [choice.get("delta") for choice in listed if isinstance(choice, dict)]
    names = ("content", "reasoning_content", "reasoning", "tool_calls")
    return any(isinstance(delta, dict) and any(map(delta.get, names)) for delta in deltas)


def _count(value: Any, most: int = MOST_TOKENS) -> int:
    """Of tokens. Raises ValueError for what is none."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{said(value)!r} tokens")
    return value


def _events(server: Server, body: bytes, deadline: float) -> Iterator[dict[str, Any]]:
    """The objects of a response of server-sent events."""
    url = f"{server.base_url}/chat/completions"
    with server.opened(url, body, ANSWER_S) as response:
        pieces = server.pieces(response, max(0.0, deadline - time.perf_counter()))
        if response.status >= 400:
            text = b"".join(pieces).decode("utf-8", "replace")
            raise InputError(
                f"{url} must answer, got status {response.status}: {said(text)}; look at the "
                f"server's log"
            )
        for line in _lines(pieces):
            name, _, value = line.partition(b":")
            if name.strip() != b"data" or value.strip() in (b"", b"[DONE]"):
                continue
            try:
                event = parse_json(value)
            except ValueError as error:
                raise InputError(
                    f"{server.base_url} must stream JSON, got {value.strip()[:100]!r}; is it a "
                    f"server of chat completions?"
                ) from error
            if isinstance(event, dict):
                yield event


def _lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """What comes in pieces, as lines, each as soon as it is there."""
    rest: list[bytes] = []
    for piece in pieces:
        *lines, last = piece.split(b"\n")
        for line in lines:
            yield b"".join((*rest, line))
            rest = []
        rest.append(last)
    yield b"".join(rest)
