"""Values from files, presets, the command line and Python, and which of them counts."""

from pathlib import Path

import pytest

from opcd.config.settings import gather, write_config
from opcd.errors import InputError
from opcd.runtime.strict_yaml import dump_yaml, parse_yaml

FILE = """
format: 1
preset: laptop
data: {context: c.md, scorer: "python:s.py:f"}
models: {model: ./m, chat_template_args: {thinking: false}}
optimizer: {steps: 1e1}
run: {output_dir: out, trackers: "tensorboard, python:t.py:make"}
"""


def test_what_counts_and_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(FILE)
    config = gather({"steps": "7", "teacher": "null"}, tmp_path / "task.yaml")
    assert (config.steps, config.max_completion_tokens, config.warmup_steps) == (7, 64, 5)
    assert config.context == str(tmp_path / "c.md")
    assert config.scorer == f"python:{tmp_path}/s.py:f"
    assert config.trackers == f"tensorboard,python:{tmp_path}/t.py:make"
    assert config.model == str(tmp_path / "m")
    assert config.output_dir == "out"
    assert config.chat_template_args == {"thinking": False}
    assert config.origins["steps"] == "command line"
    assert config.origins["max_completion_tokens"] == "preset laptop"
    assert config.origins["context"] == "task.yaml"
    assert "warmup_steps" not in config.origins
    lora = gather({}, tmp_path / "task.yaml", preset="lora")
    assert (lora.lora_rank, lora.schedule) == (16, "linear"), "the default"


@pytest.mark.parametrize(
    "text", ["1e-4", "yes", "null", "true", "010", "1", "a: b", "#", "x\ny", "é", "- a", "{a}"]
)
def test_what_is_written_is_read(text: str, tmp_path: Path) -> None:
    config = gather(
        {
            "context": "/c.md",
            "output_dir": text,
            "without_context": text,
            "chat_template_args": {"a": text, "b": {"c": [1, 1e-7, None]}},
        }
    )
    write_config(config, tmp_path / "config.yaml")
    again = gather({}, tmp_path / "config.yaml")
    assert not again.differing_fields(config)
    assert again.chat_template_args == config.chat_template_args


def test_inputs_below_the_file_move_with_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    config = gather({"context": str(tmp_path / "a" / "in" / "c.md"), "output_dir": "x"})
    write_config(config, tmp_path / "a" / "config.yaml")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = gather({}, tmp_path / "b" / "config.yaml")
    assert moved.context == str(tmp_path / "b" / "in" / "c.md")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"),
        ("1e5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("1_0", "1_0"),
        ("0x1", "0x1"),
        ("2026-05-01", "2026-05-01"),
        ("'yes'", "yes"),
        ("True", True),
        ("~", None),
    ],
)
def test_scalars(text: str, value: object) -> None:
    found = parse_yaml(f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))
    assert parse_yaml(dump_yaml({"a": value})) == {"a": value}


def test_a_context_written_into_the_settings(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("format: 1\ndata: {context: {a: a.md, b: b.md}}\n")
    with pytest.raises(InputError, match=r"context must be text, .*write it into a .json file"):
        gather({}, tmp_path / "c.yaml")
