"""A contender behind HTTP, on a server of this process."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.scorecard import accuracy
from opcd.evaluation.server import Server, server_contenders
from opcd.scoring.reasoning import split_thought
from opcd.tasks.messages import system, user
from opcd.tasks.prepare import prepare
from opcd.training.evaluate import evaluate_run
from tests.conftest import CHATML

Reply = Callable[[dict], tuple[int, Any]]


class Served:
    """An OpenAI-compatible server, and the requests that it was given."""

    def __init__(self) -> None:
        self.models: Any = ["tiny"]
        self.moved: str | None = None
        self.reply: Reply = lambda body: (200, choice(body["messages"][-1]["content"][0]))
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = served.models
                served.headers.append(dict(self.headers))
                if served.moved is not None:
                    return self._send(307, served.moved + self.path)
                listed = (
                    {"data": [{"id": m} for m in models]} if isinstance(models, list) else models
                )
                return self._send(200 if self.path == "/v1/models" else 404, listed)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.bodies.append(body)
                served.headers.append(dict(self.headers))
                self._send(*served.reply(body))

            def _send(self, status: int, value: Any) -> None:
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", value)
                self.end_headers()
                if isinstance(value, Iterator):
                    for piece in value:
                        self.wfile.write(piece)
                        self.wfile.flush()
                    return
                self.wfile.write(value if isinstance(value, bytes) else json.dumps(value).encode())

            def log_message(self, *_: object) -> None:
                """Nothing."""

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """Clients go away in the middle of an answer."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def choice(text: str | None, finish: str = "stop") -> dict:
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}]}


@contextlib.contextmanager
def running() -> Iterator[Served]:
    it = Served()
    waits = {"poll_interval": 0.01}
    thread = threading.Thread(target=it.http.serve_forever, kwargs=waits, daemon=True)
    thread.start()
    yield it
    it.http.shutdown()
    it.http.server_close()
    thread.join()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr("opcd.evaluation.server.WAITS_S", (0.0, 0.0))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which nobody answers at
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running() as it:
        yield it


def test_it_answers_without_and_with_the_context(settings: dict, served: Served) -> None:
    setup = prepare(TrainConfig(**settings | {"chat_template_args": {"thinking": False}}))
    cases = [*setup.task.test, setup.task.test[0]]
    alone, prompted = server_contenders(Server(served.url), setup, "served")
    answers = alone.answer(cases)
    assert [a.text for a in answers] == ["c", "d", "o", "a", "c"], "in their order"
    assert [a.finish for a in answers] == ["stop"] * 5
    ids = [*setup.tokenizer("c")["input_ids"], setup.stop_ids[0]]
    assert answers[0].token_ids == ids, "as long as a local one"
    assert len(served.bodies) == 4, "equal requests are sent once"
    body = next(b for b in served.bodies if b["messages"][-1]["content"] == "cat")
    assert body == {
        "model": "tiny",
        "messages": [user("cat")],
        "max_tokens": 8,
        "temperature": 0.0,
        "chat_template_kwargs": {"thinking": False},
    }
    assert not [headers for headers in served.headers if "Authorization" in headers]
    served.bodies.clear()
    prompted.answer(cases[:1])
    assert served.bodies[0]["messages"] == [system("Answer with one letter."), user("cat")]
    assert prompted.without == alone.name == "served"


def test_a_key_of_the_environment_is_sent(
    settings: dict, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "for-tests")
    setup = prepare(TrainConfig(**settings))
    Server(served.url).answers([[user("x")]], setup)
    assert [headers["Authorization"] for headers in served.headers] == ["Bearer for-tests"] * 2
    for wrong in ("for\ntests", "f\u00fcr-tests"):
        monkeypatch.setenv("OPENAI_API_KEY", wrong)
        with pytest.raises(InputError, match=r"OPENAI_API_KEY must be one line of ASCII") as raised:
            Server(served.url)
        assert wrong not in str(raised.value), "nobody's log has it"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nobody_is_followed_elsewhere_with_a_key(
    settings: dict, served: Served, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "for-tests")
    server, setup = Server(served.url), prepare(TrainConfig(**settings))
    with running() as other:
        served.reply = lambda _: (status, f"{other.url}/chat/completions")
        with pytest.raises(InputError, match=rf"got a redirect to {other.url}/chat/c.* as base_u"):
            server.answers([[user("x")]], setup)
        served.moved = other.url.removesuffix("/v1")
        with pytest.raises(InputError, match=rf"got a redirect to {other.url}/models"):
            Server(served.url)
        assert other.headers == [], "it was asked nothing"
        assert len(Server(other.url).answers([[user("x")]], setup)) == 1
        assert other.headers[0]["Authorization"] == "Bearer for-tests", "named, it is"


def test_one_that_is_busy_is_asked_again(settings: dict, served: Served) -> None:
    setup = prepare(TrainConfig(**settings))
    server = Server(served.url)
    served.reply = lambda _: (
        (200, choice("late", "length")) if len(served.bodies) > 2 else (503, {})
    )
    (answer,) = server.answers([[user("x")]], setup)
    assert (answer.text, answer.finish, len(served.bodies)) == ("late", "length", 3)
    served.bodies.clear()
    served.reply = lambda _: (503, {"error": "no room"})
    with pytest.raises(InputError, match=r"must answer, got status 503: .*no room.*server's log"):
        server.answers([[user("x")]], setup)
    assert len(served.bodies) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((400, {"error": "max_tokens is too large"}), "status 400: .*max_tokens is too large"),
        ((200, b"<html>"), "must answer with JSON, got '<html>'; give the address up to /v1"),
        ((200, b"[" * 100_000), "must answer with JSON, got '\\[\\["),
        ((200, b"\x1b[2J<html>"), "must answer with JSON, got '\ufffd\\[2J<html>'"),
        ((200, choice(["text"])), "must answer with one choice and its message"),  # type: ignore[arg-type]
        ((200, {"choices": []}), "must answer with one choice and its message"),
        ((200, ["?"]), "must answer with one choice and its message"),
    ],
)
def test_what_is_no_answer_is_an_error(
    settings: dict, served: Served, reply: tuple[int, Any], message: str
) -> None:
    server, setup = Server(served.url), prepare(TrainConfig(**settings))
    served.reply = lambda _: reply
    with pytest.raises(InputError, match=message):
        server.answers([[user("x")]], setup)
    assert len(served.bodies) == 1, "only one that is busy is asked again"


def test_one_that_does_not_end_is_left(
    settings: dict, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By size, and by time where it comes a byte at a time."""
    server, setup = Server(served.url), prepare(TrainConfig(**settings))
    over = threading.Event()

    def drip() -> Iterator[bytes]:
        while not over.wait(0.01):
            yield b" "

    monkeypatch.setattr("opcd.evaluation.server.ANSWER_S", 0.2)
    served.reply = lambda _: (200, drip())
    began = time.monotonic()
    with pytest.raises(InputError, match=r"must answer within 0 s .*got an answer that goes on"):
        server.answers([[user("x")]], setup)
    over.set()
    assert time.monotonic() - began < 2
    monkeypatch.setattr("opcd.evaluation.server.ANSWER_S", 30.0)
    monkeypatch.setattr("opcd.evaluation.server.MOST_BYTES", 1 << 20)
    served.reply = lambda _: (200, iter([b" " * (1 << 16)] * 1000))
    with pytest.raises(InputError, match="within 30 s and 1 MiB, got an answer that goes on"):
        server.answers([[user("x")]], setup)


def test_an_answer_without_text_is_empty(settings: dict, served: Served) -> None:
    served.reply = lambda _: (200, choice(None))
    (answer,) = Server(served.url).answers([[user("x")]], prepare(TrainConfig(**settings)))
    assert (answer.text, answer.tokens) == ("", 1), "its end"


def test_a_cut_thought_is_no_answer(settings: dict, served: Served, tmp_path: Path) -> None:
    """Servers leave out the mark with which the prompt has opened it."""
    template = tmp_path / "thinks.jinja"
    template.write_text(CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"))
    asked = settings | {"scorer": "contains", "chat_template": str(template)}
    setup = prepare(TrainConfig(**asked))
    case = setup.task.test[0]
    scores = {}
    for text in ("c, I think", "Is it c?</think>c", "Is it c?</think>d"):
        for finish in ("stop", "length"):
            served.reply = lambda _, text=text, finish=finish: (200, choice(text, finish))
            (answer,) = Server(served.url).answers([[user("cat")]], setup)
            scores[text, finish] = accuracy([answer], [case], setup.task.scorer, [""])
    assert [*scores.values()] == [1, 0, 1, 1, 0, 0]
    parsed = choice("c, I think", "length")
    parsed["choices"][0]["message"]["reasoning_content"] = "Is it c?"
    served.reply = lambda _: (200, parsed)
    (answer,) = Server(served.url).answers([[user("cat")]], setup)
    assert accuracy([answer], [case], setup.task.scorer, [""]) == 1, "its thought has ended"
    assert split_thought(answer.text) == ("Is it c?", "c, I think"), "and is part of the answer"
    cut = choice(None, "length")
    cut["choices"][0]["message"]["reasoning"] = "Is it c?"
    served.reply = lambda _: (200, cut)
    (answer,) = Server(served.url).answers([[user("cat")]], setup)
    assert split_thought(answer.text).answer is None, "a thought without an answer"
    assert len(answer.token_ids) == len(setup.tokenizer("<think>Is it c?")["input_ids"])


def test_a_dropped_request_is_sent_again(settings: dict, served: Served) -> None:
    setup, tries = prepare(TrainConfig(**settings)), []

    def drops(left: int) -> Any:
        def reply(_: dict) -> tuple[int, Any]:
            tries.append(None)
            if len(tries) <= left:
                raise ConnectionResetError
            return 200, choice("c")

        return reply

    served.reply = drops(2)
    (answer,) = Server(served.url).answers([[user("cat")]], setup)
    assert answer.text == "c"
    assert len(tries) == 3
    tries.clear()
    served.reply = drops(3)
    with pytest.raises(InputError, match="a server must answer at"):
        Server(served.url).answers([[user("cat")]], setup)
    assert len(tries) == 3


def test_where_no_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=rf"a server must answer at http://127.0.0.1:{port}/v1 wi"):
        Server(f"http://127.0.0.1:{port}/v1")
    wrong = ("file:///etc/hosts", "127.0.0.1:8000", "http:///v1", "http://[v1", "http://x:99999/v1")
    for address in wrong:
        with pytest.raises(InputError, match="base_url must be an address like"):
            Server(address)


def test_one_that_does_not_answer_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcd.evaluation.server.LOOKUP_S", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        with pytest.raises(InputError, match=r"within 0 s, got .*timed out"):
            Server(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1")


def test_the_model_must_be_one_of_the_server(served: Served) -> None:
    served.models = ["small", "large"]
    assert Server(served.url, "large").model == "large"
    with pytest.raises(InputError, match=r"got none where there are 2 \(small, large\); name one"):
        Server(served.url)
    with pytest.raises(InputError, match="got 'huge' where there are small, large; name one"):
        Server(served.url, "huge")
    for wrong in ({"object": "list"}, [7], ["tiny\x1b[2J"], "tiny"):
        served.models = wrong
        with pytest.raises(InputError, match="must list models as OpenAI's does") as raised:
            Server(served.url)
        assert "\x1b" not in str(raised.value), "a terminal is not told what to do"
    with pytest.raises(InputError, match="must answer, got status 404"):
        Server(served.url.removesuffix("/v1"))


def test_it_is_scored_beside_a_runs_models(settings: dict, served: Served, tmp_path: Path) -> None:
    served.reply = lambda body: (200, choice("a" if len(body["messages"]) > 1 else "z"))
    where = str(tmp_path / "out")
    _, found = evaluate_run(
        TrainConfig(**settings), "none", where, contenders={"server": served.url}
    )
    columns = found.card["contenders"]
    assert list(columns) == ["base", "prompted", "server", "server_prompted"]
    assert columns["server_prompted"]["accuracy"] == 0.25  # ant
    assert columns["server"]["accuracy"] == 0
    assert "harm" not in columns["server_prompted"], "nothing is right without it"
    assert [row["server"] for row in found.answers] == ["z"] * 4
