"""Times of a server with known delays."""

import json
import time

import pytest

from opcd.errors import InputError
from opcd.evaluation.server import Server
from opcd.serving import stream
from opcd.serving.measure import Asking, Figures, measured
from opcd.serving.stream import body_of, timed
from opcd.tasks.messages import system, user
from tests.opcd.serving.fake_server import Behaviour

PROMPT = system("one two three four five six")
REQUESTS = [[PROMPT, user(f"request {i}")] for i in range(200)]
ASKING = Asking(answer_tokens=3, template_args={}, alone=6, at_once=(1, 4))


def ask(server: Server, asking: Asking = ASKING) -> Figures:
    return measured(server, REQUESTS, asking)


def test_first_token_and_each_behind_it(served: Server, behaviour: Behaviour) -> None:
    behaviour.first_s, behaviour.each_s, behaviour.cold_s = 0.03, 0.004, 0.5
    found = ask(served)
    # The warm-up, which is half a second slower, shows nowhere.
    assert 0.03 < found.first_s.low <= found.first_s.median <= found.first_s.high < 0.3
    assert found.first_s.n == 6
    assert found.each_s is not None
    assert 0.004 < found.each_s.median < 0.03
    assert (found.prompt_tokens, found.cached_tokens) == (8, None)
    assert found.answer_tokens == 3
    one, four = found.loads
    # 0.03 s and two of 0.004 s each; four at a time are four times as many.
    assert 3 < one.requests_per_s.median < 1 / 0.038
    assert 1.5 < four.requests_per_s.median / one.requests_per_s.median < 4.5
    assert found.best is four
    assert found.device_s.median == pytest.approx(1 / four.requests_per_s.median)
    assert found.device_s.low <= found.device_s.median <= found.device_s.high
    assert (one.requests, four.requests, one.requests_per_s.n) == (12, 24, 3)
    assert behaviour.most_under_way == 4


def test_answers_alone_are_long_enough_to_time_a_token(
    served: Server, behaviour: Behaviour
) -> None:
    ask(served)
    lengths = [body["max_tokens"] for body in behaviour.bodies]
    # One to see what it takes, the warm-up, alone, under load.
    assert lengths == [1, *[3] * 6, *[16] * 6, *[3] * 36]
    asked = [body["messages"][-1]["content"] for body in behaviour.bodies[1:]]
    assert len(set(asked)) == len(asked), "no request comes twice while there are others"
    assert all(body["temperature"] == 0 and body["ignore_eos"] for body in behaviour.bodies)


def test_cached_tokens_are_counted(served: Server, behaviour: Behaviour) -> None:
    behaviour.caching = True
    assert ask(served).cached_tokens == 6
    behaviour.seen.clear()
    behaviour.details = False
    assert ask(served).cached_tokens is None


def test_a_server_that_refuses_what_openai_does_not_have(
    served: Server, behaviour: Behaviour
) -> None:
    behaviour.strict = True
    found = ask(served)
    assert found.answer_tokens == 2, "as it ends them"
    assert not any("ignore_eos" in body for body in behaviour.bodies)


def test_it_ends_when_its_time_is_over(served: Server, behaviour: Behaviour) -> None:
    behaviour.first_s = 0.02
    began = time.monotonic()
    found = ask(served, ASKING._replace(seconds=0.0))
    assert time.monotonic() - began < 1
    assert found.first_s.n == 1
    assert [load.requests_per_s.n for load in found.loads] == [1, 1], "one round of each"


def test_a_chat_template_is_given_its_arguments(served: Server, behaviour: Behaviour) -> None:
    timed(served, body_of(served, REQUESTS[0], 2, {"thinking": False}, True))
    assert behaviour.bodies[-1]["chat_template_kwargs"] == {"thinking": False}
    assert behaviour.bodies[-1]["stream_options"] == {"include_usage": True}


SAYS = b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'
USAGE = {"prompt_tokens": 1, "completion_tokens": 1}


def usage(**other: object) -> list[bytes]:
    return [b"data: " + json.dumps({"usage": USAGE | other}).encode() + b"\n"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([SAYS, b"data: [DONE]\n\n"], "their usage, got none: 'usage'"),
        ([b"data: " + json.dumps({"usage": USAGE}).encode() + b"\n"], "got none: 'content'"),
        ([b"data: <html>\n"], "must stream JSON, got b'<html>'"),
        ([SAYS, b'data: {"usage": {"prompt_tokens": "many"}}\n'], "with their text and their"),
        ([SAYS, b'data: {"usage": 7}\n'], "with their text and their"),
        ([b'data: {"choices": 7}\n', *usage()], "got none: 'content'"),
        ([SAYS, *usage(prompt_tokens=float("inf"))], "'inf' tokens"),
        ([SAYS, *usage(prompt_tokens=-1)], "'-1' tokens"),
        ([SAYS, *usage(completion_tokens=True)], "'True' tokens"),
        ([SAYS, *usage(prompt_tokens_details={"cached_tokens": 2})], "'2' tokens"),
        ([b"data: " + b"[" * 100_000 + b"\n"], "must stream JSON"),
    ],
)
def test_what_is_no_stream_is_an_error(
    served: Server, behaviour: Behaviour, lines: list[bytes], message: str
) -> None:
    behaviour.lines = lines
    with pytest.raises(InputError, match=message):
        timed(served, body_of(served, REQUESTS[0], 2, {}, True))


def test_an_answer_without_end_is_not_waited_for(
    served: Server, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ANSWER_S", 0.05)
    behaviour.each_s = 0.02
    with pytest.raises(InputError, match="got an answer that goes on"):
        timed(served, body_of(served, REQUESTS[0], 100, {}, True))


def test_a_stream_that_never_ends_a_line_is_left(
    served: Server, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opcd.evaluation.server.MOST_BYTES", 1 << 20)
    behaviour.lines = [SAYS, *[b"x" * (1 << 16)] * 1000]
    with pytest.raises(InputError, match="1 MiB, got an answer that goes on"):
        timed(served, body_of(served, REQUESTS[0], 2, {}, True))


def test_a_line_may_come_in_pieces() -> None:
    pieces = iter([b"da", b"ta: 1\nda", b"ta: 2\n\n", b"data: 3"])
    assert [*stream._lines(pieces)] == [b"data: 1", b"data: 2", b"", b"data: 3"]


def test_a_status_is_said(behaviour: Behaviour, url: str) -> None:
    behaviour.key = "right"
    server = Server(url, key="right")
    server._key = "wrong"
    with pytest.raises(InputError, match=r"chat/completions must answer, got status 401"):
        timed(server, body_of(server, REQUESTS[0], 2, {}, True))
