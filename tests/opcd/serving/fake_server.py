"""A small server of OpenAI's chat completions, with vLLM's additions; the standard library alone.

Tokens of it are words: a prompt has as many as its messages, and an answer is "token " again and
again. `Behaviour` says what else it does.
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = (
    "# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig\n"
    'vllm:cache_config_info{block_size="8",engine="0",num_gpu_blocks="100",x="None"} 1.0\n'
)


@dataclass
class Behaviour:
    """What a server does, and what it was asked."""

    models: list[str] = field(default_factory=lambda: ["tiny"])
    key: str | None = None  # without which it answers 401
    caching: bool = False  # of whole messages; counted in the usage
    details: bool = True  # whether it counts cached tokens
    first_s: float = 0.0  # until the first token
    each_s: float = 0.0  # for each behind it
    cold_s: float = 0.0  # for the first request of all
    strict: bool = False  # refuses what OpenAI's does not have
    metrics: str | None = METRICS
    # Of a request that is not streamed, the response.
    answer: Callable[[dict], Any] = lambda body: {}
    lines: list[bytes] | None = None  # in place of every stream
    bodies: list[dict] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    seen: set[str] = field(default_factory=set)
    lock: Any = field(default_factory=threading.Lock)


def server(behaviour: Behaviour, port: int = 0) -> ThreadingHTTPServer:
    """One on the loopback interface; the caller serves and closes it."""

    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            if self.path == "/metrics" and behaviour.metrics is not None:
                return self._send(200, behaviour.metrics.encode())
            if self.path != "/v1/models":
                return self._send(404, b"{}")
            if not self._may():
                return self._send(401, b"{}")
            listed = {"data": [{"id": name} for name in behaviour.models]}
            return self._send(200, json.dumps(listed).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._may():
                return self._send(401, b"{}")
            if behaviour.strict and "ignore_eos" in body:
                return self._send(400, b'{"error": "unknown argument ignore_eos"}')
            with behaviour.lock:
                first = not behaviour.bodies
                behaviour.bodies.append(body)
                behaviour.under_way += 1
                behaviour.most_under_way = max(behaviour.most_under_way, behaviour.under_way)
            try:
                time.sleep(behaviour.cold_s if first else 0.0)
                if body.get("stream"):
                    return self._stream(body)
                return self._send(200, json.dumps(behaviour.answer(body)).encode())
            finally:
                with behaviour.lock:
                    behaviour.under_way -= 1

        def _stream(self, body: dict) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            if behaviour.lines is not None:
                for line in behaviour.lines:
                    self.wfile.write(line)
                return
            time.sleep(behaviour.first_s)
            self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
            count = body["max_tokens"] if body.get("ignore_eos") else min(2, body["max_tokens"])
            for i in range(count):
                time.sleep(behaviour.each_s if i else 0.0)
                self._event({"choices": [{"delta": {"content": "token "}}]})
            self._event({"choices": [], "usage": self._usage(body, count)})
            self.wfile.write(b"data: [DONE]\n\n")

        def _usage(self, body: dict, count: int) -> dict:
            words = [len(message["content"].split()) for message in body["messages"]]
            cached = 0
            with behaviour.lock:
                for message, length in zip(body["messages"][:-1], words, strict=False):
                    cached += length if message["content"] in behaviour.seen else 0
                    behaviour.seen.add(message["content"])
            usage: dict = {"prompt_tokens": sum(words), "completion_tokens": count}
            if behaviour.caching and behaviour.details and cached:
                usage["prompt_tokens_details"] = {"cached_tokens": cached}
            return usage

        def _event(self, value: dict) -> None:
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
            self.wfile.flush()

        def _may(self) -> bool:
            return behaviour.key in (None, self.headers.get("Authorization", "")[len("Bearer ") :])

        def _send(self, status: int, text: bytes) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients go away in the middle of an answer."""

    return Quiet(("127.0.0.1", port), Handler)
