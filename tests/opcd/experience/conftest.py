"""What the loop is tested with, on problems and on games."""

from pathlib import Path

import pytest

from tests.conftest import tiny_llama, tiny_tokenizer
from tests.opcd.experience.loops import keep_whatever


@pytest.fixture(scope="session")
def brief_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that ends about half of its answers by itself."""
    folder = tmp_path_factory.mktemp("brief")
    model = tiny_llama()
    model.lm_head.weight.data[1] *= 20
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def kept_whatever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts that help, and rounds that are better: what a random model seldom has."""
    keep_whatever(monkeypatch)
