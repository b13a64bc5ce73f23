"""A server of this process that behaves as a test says."""

import threading
from collections.abc import Iterator

import pytest

from opcd.evaluation.server import Server
from tests.opcd.serving.fake_server import Behaviour, server


@pytest.fixture
def behaviour() -> Behaviour:
    """What the server does; to be set before or while it is asked."""
    return Behaviour()


@pytest.fixture
def url(behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    http = server(behaviour)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def served(url: str) -> Server:
    """That server, as it is asked."""
    return Server(url)
