"""The starter's files: a web shop's mailroom, whose prompt is a sentence and 18 demonstrations."""

from importlib.resources import files
from pathlib import Path

from opcd.errors import InputError
from opcd.runtime.files import make_folder
from opcd.runtime.strict_yaml import dump_yaml

TASK = ("context.json", "prompts.jsonl", "validation.jsonl", "test.jsonl")
CONFIG = """\
# A web shop's mailroom: a prompt that routes messages to three desks, moved into the weights.
# Every field: opcd train --help. Files are found from this file's folder, output_dir from yours.
format: 1
preset: laptop # or one-gpu, lora

data:
  context: context.json # what only the teacher sees: chat messages, or a text in a .md file
  prompts: prompts.jsonl # requests as your users send them; no answers needed
  validation_data: validation.jsonl # with answers: chooses the checkpoint
  test_data: test.jsonl # with answers: the scorecard
  scorer: exact # when an answer is right

models:
  model: smollm2-135m-instruct # a Hugging Face name, a folder, or this small one

sampling:
  max_completion_tokens: 8 # a desk and its end take two or three

optimizer:
  steps: 30

run:
  output_dir: {output_dir}
"""


def write_starter(folder: Path) -> Path:
    """Write the starter task into `folder`; returns the path of its config.yaml.

    Raises InputError for a folder that holds something, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"the folder must not be there yet, or be empty, got {str(folder)!r}; name another"
        )
    make_folder(folder)
    task = files("opcd.starter") / "task"
    for name in TASK:
        (folder / name).write_bytes((task / name).read_bytes())
    config = folder / "config.yaml"
    output_dir = dump_yaml(str(folder.absolute() / "run")).splitlines()[0]
    config.write_text(CONFIG.format(output_dir=output_dir), encoding="utf-8")
    return config
