"""A contender behind HTTP: any server of OpenAI's chat completions (vLLM, SGLang, llama.cpp, ...).

It renders its own chat template and keeps its own precision: what is measured is what is served.
Only the standard library is needed. What it sends is a stranger's: bounded in size and time, and it
sends nobody on, who would take the key along.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPRedirectHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    build_opener,
)

from opcd.errors import InputError
from opcd.evaluation.contenders import Answer, Contender
from opcd.runtime.strict_json import parse_json
from opcd.scoring.reasoning import PAIRS
from opcd.tasks.messages import Message
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case

LOOKUP_S, ANSWER_S = 10.0, 120.0  # until an answer begins, and from there to its end
MOST_BYTES, PIECE_BYTES = 64 << 20, 1 << 16  # of an answer, and of what is read at once
AT_ONCE = 8  # requests under way
LONGEST_SAID = 200  # characters of what it sent, in an error
BUSY = {429, 500, 502, 503, 504}  # asked again
WAITS_S = (1.0, 4.0)
KEY = "OPENAI_API_KEY"  # of the environment; sent where it is set
LOCAL = ("localhost", "127.0.0.1", "::1")


class _Stays(HTTPRedirectHandler):
    """Follows nobody: urllib would give the key to whomever a server names."""

    def redirect_request(self, *_: Any) -> None:
        """See above."""


class NoAnswer(InputError):
    """No response came, or it broke off."""


class Server:
    """The server at a base URL, such as ``http://127.0.0.1:8000/v1``, and the model asked there.

    key: sent with every request, in place of the environment's.
    Raises InputError where no server answers, and for a model that it does not serve.
    """

    def __init__(self, base_url: str, model: str | None = None, key: str | None = None) -> None:
        try:
            parts = urlsplit(base_url)
            right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of a port, or of brackets
            right = False
        if not right:
            raise InputError(
                f"base_url must be an address like http://127.0.0.1:8000/v1, got {base_url!r}; "
                f"correct it"
            )
        self.base_url = base_url.rstrip("/")
        self._key = key
        # A proxy of the environment does not know what is on this machine.
        own = [ProxyHandler({})] if parts.hostname in LOCAL else []
        self._opener: OpenerDirector = build_opener(_Stays, *own)
        served = self._served()
        if model is None and len(served) != 1:
            raise InputError(
                f"served_model must say which model of {self.base_url} answers, got none where "
                f"there are {len(served)} ({', '.join(served[:5])}); name one"
            )
        if model is not None and model not in served:
            raise InputError(
                f"served_model must be one of {self.base_url}, got {model!r} where there "
                f"are {', '.join(served[:5])}; name one of them"
            )
        self.model = model or served[0]

    def answers(self, requests: Sequence[Sequence[Message]], setup: Setup) -> list[Answer]:
        """Answers, several requests under way at a time; equal ones are sent once, unless drawn.

        Lengths are counted in the base model's tokens. Raises InputError for what is no answer.
        """
        bodies = [json.dumps(self._body(messages, setup), sort_keys=True) for messages in requests]
        if setup.config.eval_temperature:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return [_answer(*found, setup) for found in pool.map(self._completed, bodies)]
        distinct = list(dict.fromkeys(bodies))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = dict(zip(distinct, pool.map(self._completed, distinct), strict=True))
        return [_answer(*found[body], setup) for body in bodies]

    def _body(self, messages: Sequence[Message], setup: Setup) -> dict[str, Any]:
        config = setup.config
        more = {"chat_template_kwargs": config.chat_template_args}
        return {
            "model": self.model,
            "messages": list(messages),
            "max_tokens": config.max_completion_tokens,
            "temperature": config.eval_temperature,
            # Said also where it is 1: a server may have another default.
            **({"top_p": config.top_p} if config.eval_temperature else {}),
            **({"top_k": config.top_k} if config.top_k else {}),  # beyond OpenAI's, as vLLM has it
            **({"stop": list(config.stop)} if config.stop else {}),
            **(more if config.chat_template_args else {}),
        }

    def _served(self) -> list[str]:
        found = self.read("/models", None, LOOKUP_S)
        try:
            names = [model["id"] for model in found["data"]]
            if not all(isinstance(name, str) and name.isprintable() for name in names):
                raise TypeError("a name is a line of text")
        except (TypeError, KeyError) as error:
            raise InputError(
                f"{self.base_url}/models must list models as OpenAI's does, got "
                f"{said(found)}; give the address up to /v1"
            ) from error
        return names

    def _completed(self, body: str) -> tuple[str, str, str]:
        """The text of an answer, why it ended, and the thought that came apart from it."""
        found = self.read("/chat/completions", body.encode(), ANSWER_S)
        try:
            (choice,) = found["choices"]
            message, finish = choice["message"], choice["finish_reason"]
            text = message["content"] or ""
            thought = message.get("reasoning_content") or message.get("reasoning") or ""
            if not (isinstance(text, str) and isinstance(thought, str)):
                raise TypeError("an answer is a text, and so is a thought")
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"{self.base_url} must answer with one choice and its message, got "
                f"{said(found)}; is it a server of chat completions?"
            ) from error
        return text, "length" if finish == "length" else "stop", thought

    def read(self, path: str, body: bytes | None, limit_s: float) -> Any:
        """The JSON at a path; a server that is busy, or drops a request, is asked again, twice."""
        for wait_s in (*WAITS_S, None):
            try:
                status, text = self._asked(path, body, limit_s)
            except NoAnswer:
                if body is None or wait_s is None:  # whether one is there at all is said at once
                    raise
            else:
                if status not in BUSY or wait_s is None:
                    break
            time.sleep(wait_s)
        if status >= 400:
            raise InputError(
                f"{self.base_url}{path} must answer, got status {status}: {said(text)}; look at "
                f"the server's log"
            )
        try:
            return parse_json(text)
        except ValueError as error:
            raise InputError(
                f"{self.base_url}{path} must answer with JSON, got {said(text)!r}; give the "
                f"address up to /v1"
            ) from error

    def _asked(self, path: str, body: bytes | None, limit_s: float) -> tuple[int, str]:
        """Status and text of a response. Raises InputError where there is none."""
        with self.opened(self.base_url + path, body, limit_s) as response:
            text = b"".join(self.pieces(response, limit_s))
            return response.status, text.decode("utf-8", "replace")

    @contextmanager
    def opened(self, url: str, body: bytes | None, limit_s: float) -> Iterator[Any]:
        """A response to be read, whatever its status. Raises InputError where there is none.

        limit_s: until it begins, and until each part of it comes.
        """
        headers = {"Content-Type": "application/json"}
        if key := self._key or os.environ.get(KEY):
            if not key.isascii() or not key.isprintable():
                raise InputError(f"{KEY} must be one line of ASCII, got another; set it anew")
            headers["Authorization"] = f"Bearer {key}"
        try:
            response = self._opener.open(Request(url, body, headers), timeout=limit_s)
        except HTTPError as error:
            response = error
        except (URLError, HTTPException, OSError) as error:
            raise self._no_answer(error, limit_s) from error
        with response:
            if 300 <= response.status < 400:
                raise InputError(
                    f"{url} must answer itself, got a redirect to "
                    f"{said(response.headers.get('Location'))}, which is not followed, for the "
                    f"key goes with a request; name the address that answers as base_url"
                )
            yield response

    def pieces(self, response: Any, limit_s: float) -> Iterator[bytes]:
        """A response as it comes.

        Raises InputError for one that breaks off, takes longer than `limit_s`, or does not end.
        """
        deadline, size = time.monotonic() + limit_s, 0
        while piece := self._piece(response, limit_s):
            size += len(piece)
            if size > MOST_BYTES or time.monotonic() > deadline:
                raise InputError(
                    f"{self.base_url} must answer within {limit_s:.0f} s and {MOST_BYTES >> 20} "
                    f"MiB, got an answer that goes on; look at the server's log"
                )
            yield piece

    def _piece(self, response: Any, limit_s: float) -> bytes:
        try:
            piece: bytes = response.read1(PIECE_BYTES)
        except (HTTPException, OSError) as error:
            raise self._no_answer(error, limit_s) from error
        return piece

    def _no_answer(self, error: Exception, limit_s: float) -> "NoAnswer":
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        return NoAnswer(
            f"a server must answer at {self.base_url} within {limit_s:.0f} s, got {reason}; "
            f"start it, or correct base_url"
        )


def said(value: Any) -> str:
    """What a server sent, in a line for people: short, and without what a terminal acts on."""
    text = " ".join(str(value)[:LONGEST_SAID].split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def server_contenders(server: Server, setup: Setup, name: str) -> list[Contender]:
    """What is served, without the context and with it.

    Raises InputError for a context with tools, whose calls come back in forms of their own.
    """
    if any(chat.tools for chat in setup.chats.values()):
        raise InputError(
            f"a contender behind HTTP must do without tools, got a context with some; leave {name} "
            f"out, or name a folder with the model"
        )

    def alone(cases: Sequence[Case]) -> list[Answer]:
        chats = setup.chats
        asked = [chats[c.prompt.context].student_messages(c.example.messages) for c in cases]
        return server.answers(asked, setup)

    def prompted(cases: Sequence[Case]) -> list[Answer]:
        chats = setup.chats
        asked = [chats[c.prompt.context].teacher_messages(c.example.messages) for c in cases]
        return server.answers(asked, setup)

    both = f"{name}_prompted"
    return [
        Contender(name, f"{server.model}, served, without the context", alone, "", True),
        Contender(both, f"{server.model}, served, with the context", prompted, name, True),
    ]


def _answer(text: str, finish: str, thought: str, setup: Setup) -> Answer:
    if thought:  # as models write it that nobody takes apart
        begins, ends = PAIRS[0]
        text = begins + thought + (ends + text if text or finish == "stop" else "")
    ids = [*setup.tokenizer(text, add_special_tokens=False)["input_ids"]]
    if finish == "stop":
        ids.append(setup.stop_ids[0])  # which servers leave out
    elif not thought:
        text = setup.chat.within_a_thought(text)
    return Answer(text.strip(), ids, finish, text)
