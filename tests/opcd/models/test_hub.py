"""Names that are no folder: what is asked of a hub, and what is said."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from opcd.errors import InputError
from opcd.models import hub
from opcd.models.by_name import load_config, resolve_model

ERRORS = {"someone/none": (404, "RepoNotFound"), "someone/gated": (403, "GatedRepo")}


class Hub(BaseHTTPRequestHandler):
    """Answers as a hub does, and counts."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        name = self.path.strip("/").removesuffix("/config.json")
        self.asked.append(name)
        status, code = ERRORS.get(name, (200, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names that a hub on this machine was asked for."""
    server = HTTPServer(("127.0.0.1", 0), Hub)
    at = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "hf_hub_url", lambda name, file: f"{at}/{name}/{file}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Hub.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Hub.asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("someone/none", "distilled must be a folder, a hub's .* the hub has no such model"),
        ("someone/gated", "there is no such folder, and its owner's terms .* not accepted"),
    ],
)
def test_a_hub_is_asked_once(name: str, said: str, asked: list[str]) -> None:
    with pytest.raises(InputError, match=said):
        resolve_model(name, "distilled" if "none" in name else "model")
    assert asked == [name]


def test_a_name_that_the_hub_knows(asked: list[str]) -> None:
    assert resolve_model("someone/model") == "someone/model"
    assert asked == ["someone/model"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nope", "there is no such folder; check the path"),
        ("smollm2-135m-instuct", "did you mean smollm2-135m-instruct?"),
    ],
)
def test_a_name_without_an_owner_is_not_looked_for(name: str, said: str, asked: list[str]) -> None:
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        load_config(name)
    assert not asked


def test_without_a_network_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hf_hub_url", lambda name, file: f"http://127.0.0.1:9/{name}/{file}")
    with pytest.raises(InputError, match="not fetched before, and the hub cannot be asked"):
        resolve_model("someone/model")
