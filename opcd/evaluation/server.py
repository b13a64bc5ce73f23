"""A contender behind HTTP: any server of OpenAI's chat completions (vLLM, SGLang, llama.cpp, ...).

It renders its own chat template and keeps its own precision: what is measured is what is served.
Only the standard library is needed.
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
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from opcd.errors import InputError
from opcd.evaluation.contenders import Answer, Contender
from opcd.tasks.messages import Message
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case

LOOKUP_S, ANSWER_S = 10.0, 120.0  # until an answer begins, or goes on
AT_ONCE = 8  # requests under way
BUSY = {429, 500, 502, 503, 504}  # asked again
WAITS_S = (1.0, 4.0)
KEY = "OPENAI_API_KEY"  # of the environment; sent where it is set
LOCAL = ("localhost", "127.0.0.1", "::1")


class Server:
    """The server at a base URL, such as ``http://127.0.0.1:8000/v1``, and the model asked there.

    key: sent with every request, in place of the environment's.
    Raises InputError where no server answers, and for a model that it does not serve.
    """

    def __init__(self, base_url: str, model: str | None = None, key: str | None = None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"base_url must be an address like http://127.0.0.1:8000/v1, got {base_url!r}; "
                f"correct it"
            )
        self.base_url = base_url.rstrip("/")
        self._key = key
        # A proxy of the environment does not know what is on this machine.
        own = [ProxyHandler({})] if parts.hostname in LOCAL else []
        self._opener: OpenerDirector = build_opener(*own)
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
                return [_answer(*said, setup) for said in pool.map(self._completed, bodies)]
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
            **({"top_p": config.top_p} if config.top_p < 1 else {}),
            **({"top_k": config.top_k} if config.top_k else {}),  # beyond OpenAI's, as vLLM has it
            **({"stop": list(config.stop)} if config.stop else {}),
            **(more if config.chat_template_args else {}),
        }

    def _served(self) -> list[str]:
        found = self.read("/models", None, LOOKUP_S)
        try:
            return [model["id"] for model in found["data"]]
        except (TypeError, KeyError) as error:
            raise InputError(
                f"{self.base_url}/models must list models as OpenAI's does, got "
                f"{str(found)[:100]}; give the address up to /v1"
            ) from error

    def _completed(self, body: str) -> tuple[str, str]:
        """The text of an answer, and why it ended."""
        found = self.read("/chat/completions", body.encode(), ANSWER_S)
        try:
            (choice,) = found["choices"]
            text, finish = choice["message"]["content"] or "", choice["finish_reason"]
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(
                f"{self.base_url} must answer with one choice and its message, got "
                f"{str(found)[:200]}; is it a server of chat completions?"
            ) from error
        return text, "length" if finish == "length" else "stop"

    def read(self, path: str, body: bytes | None, limit_s: float) -> Any:
        """The JSON at a path; a server that is busy is asked again, twice."""
        status, text = self._asked(path, body, limit_s)
        for wait_s in WAITS_S:
            if status not in BUSY:
                break
            time.sleep(wait_s)
            status, text = self._asked(path, body, limit_s)
        said = " ".join(text.split())[:200]
        if status >= 400:
            raise InputError(
                f"{self.base_url}{path} must answer, got status {status}: {said}; look at the "
                f"server's log"
            )
        try:
            return json.loads(text)
        except ValueError as error:
            raise InputError(
                f"{self.base_url}{path} must answer with JSON, got {said!r}; give the address "
                f"up to /v1"
            ) from error

    def _asked(self, path: str, body: bytes | None, limit_s: float) -> tuple[int, str]:
        """Status and text of a response. Raises InputError where there is none."""
        with self.opened(self.base_url + path, body, limit_s) as response:
            return response.status, self._text(response, limit_s)

    @contextmanager
    def opened(self, url: str, body: bytes | None, limit_s: float) -> Iterator[Any]:
        """A response to be read, whatever its status. Raises InputError where there is none.

        limit_s: until it begins, and until each part of it comes.
        """
        headers = {"Content-Type": "application/json"}
        if key := self._key or os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            response = self._opener.open(Request(url, body, headers), timeout=limit_s)
        except HTTPError as error:
            response = error
        except (URLError, HTTPException, OSError) as error:
            raise self._no_answer(error, limit_s) from error
        with response:
            yield response

    def _text(self, response: Any, limit_s: float) -> str:
        try:
            text: str = response.read().decode("utf-8", "replace")
        except (HTTPException, OSError) as error:
            raise self._no_answer(error, limit_s) from error
        return text

    def _no_answer(self, error: Exception, limit_s: float) -> InputError:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        return InputError(
            f"a server must answer at {self.base_url} within {limit_s:.0f} s, got {reason}; "
            f"start it, or correct base_url"
        )


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
        Contender(name, f"{server.model}, served, without the context", alone),
        Contender(both, f"{server.model}, served, with the context", prompted, without=name),
    ]


def _answer(text: str, finish: str, setup: Setup) -> Answer:
    ids = setup.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Answer(text.strip(), list(ids), finish, text)
