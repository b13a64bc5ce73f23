"""The README's Python runs, and the files it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_snippets() -> None:
    assert SNIPPETS


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_snippets_run(code: str, settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model name in a snippet stands for the tiny model here."""
    code = re.sub(r'from_pretrained\("[^"]+"', f'from_pretrained("{settings["model"]}"', code)
    monkeypatch.chdir(Path(settings["output_dir"]).parent)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    if "scored" in names:
        assert names["scored"].cu_seqlens.tolist() == [0, 2, 5]
        assert len(names["scored"].hidden) == 5
    else:
        assert names["student_hidden"].grad.abs().sum() > 0
        assert (names["out"].per_token > 0).all()


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_map_names_every_module() -> None:
    for folder in ("opcd", "opcd_kernels"):
        for file in (ROOT / folder).glob("*.py"):
            if file.name not in ("__init__.py",):
                assert file.name in README, f"{folder}/{file.name} is missing from the map"
