"""The tokens that all prompts of a context begin with."""

from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.tasks.prepare import prepare
from tests.conftest import write_jsonl


@pytest.mark.parametrize("start", ["red", "Hm? ", "3 + 4 "])
def test_a_start_that_all_requests_share_is_not_the_contexts(settings: dict, start: str) -> None:
    for name in ("prompts", "validation_data", "test_data"):
        rows = [{"prompt": f"{start}{name}{i}", "answer": "a"} for i in range(4)]
        write_jsonl(Path(settings[name]), rows)
    setup = prepare(TrainConfig(**settings))
    assert setup.tokenizer.decode(setup.task.a_prefix) == (
        "<|im_start|>system\nAnswer with one letter.<|im_end|>\n<|im_start|>user\n"
    )
