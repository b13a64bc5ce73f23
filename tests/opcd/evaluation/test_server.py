"""A contender behind HTTP, on a server of this process."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.server import Server, server_contenders
from opcd.tasks.messages import system, user
from opcd.tasks.prepare import prepare
from opcd.training.evaluate import evaluate_run

Reply = Callable[[dict], tuple[int, Any]]


class Served:
    """An OpenAI-compatible server, and the requests that it was given."""

    def __init__(self) -> None:
        self.models: Any = ["tiny"]
        self.reply: Reply = lambda body: (200, choice(body["messages"][-1]["content"][0]))
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = served.models
                listed = (
                    {"data": [{"id": m} for m in models]} if isinstance(models, list) else models
                )
                self._send(200 if self.path == "/v1/models" else 404, listed)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served.bodies.append(body)
                served.headers.append(dict(self.headers))
                self._send(*served.reply(body))

            def _send(self, status: int, value: Any) -> None:
                text = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def choice(text: str | None, finish: str = "stop") -> dict:
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}]}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr("opcd.evaluation.server.WAITS_S", (0.0, 0.0))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which nobody answers at
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    it = Served()
    thread = threading.Thread(target=it.http.serve_forever, daemon=True)
    thread.start()
    yield it
    it.http.shutdown()
    it.http.server_close()
    thread.join()


def test_it_answers_without_and_with_the_context(settings: dict, served: Served) -> None:
    setup = prepare(TrainConfig(**settings | {"chat_template_args": {"thinking": False}}))
    cases = [*setup.task.test, setup.task.test[0]]
    alone, prompted = server_contenders(Server(served.url), setup, "served")
    answers = alone.answer(cases)
    assert [a.text for a in answers] == ["c", "d", "o", "a", "c"], "in their order"
    assert [a.finish for a in answers] == ["stop"] * 5
    assert answers[0].token_ids == setup.tokenizer("c")["input_ids"]
    assert len(served.bodies) == 4, "equal requests are sent once"
    body = next(b for b in served.bodies if b["messages"][-1]["content"] == "cat")
    assert body == {
        "model": "tiny",
        "messages": [user("cat")],
        "max_tokens": 8,
        "temperature": 0.0,
        "chat_template_kwargs": {"thinking": False},
    }
    assert "Authorization" not in served.headers[0]
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
    assert served.headers[0]["Authorization"] == "Bearer for-tests"


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


def test_an_answer_without_text_is_empty(settings: dict, served: Served) -> None:
    served.reply = lambda _: (200, choice(None))
    (answer,) = Server(served.url).answers([[user("x")]], prepare(TrainConfig(**settings)))
    assert (answer.text, answer.tokens) == ("", 0)


def test_where_no_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match=rf"a server must answer at http://127.0.0.1:{port}/v1 wi"):
        Server(f"http://127.0.0.1:{port}/v1")
    for address in ("file:///etc/hosts", "127.0.0.1:8000", "http:///v1"):
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
    served.models = {"object": "list"}
    with pytest.raises(InputError, match="must list models as OpenAI's does"):
        Server(served.url)
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
