"""Prompts that have nothing to do with the context, to be trained on."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.elsewhere import BUILT_IN as ELSEWHERE
from opcd.tasks.messages import user
from opcd.tasks.prepare import Setup, prepare
from opcd.tasks.replay import BUILT_IN, WITHOUT
from tests.conftest import write_jsonl


def prompts_of(file: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in file.read_text("utf-8").splitlines()]


def plain(prompt: str) -> str:
    return re.sub(r"\W+", " ", prompt).strip().lower()


def test_the_packages_own_differ_from_what_is_measured_elsewhere() -> None:
    prompts = prompts_of(BUILT_IN)
    assert len({plain(p) for p in prompts}) == 160
    assert not {plain(p) for p in prompts} & {plain(p) for p in prompts_of(ELSEWHERE)}
    assert all(p == p.strip() == unicodedata.normalize("NFC", p) for p in prompts)


def replayed(settings: dict, rows: list[Any] | None = None, **change: Any) -> Setup:
    settings = settings | {"replay_share": 0.25} | change
    if rows is not None:
        file = Path(settings["context"]).with_name("again.jsonl")
        settings |= {"replay_data": str(write_jsonl(file, rows))}
    return prepare(TrainConfig(**settings), for_training=True)


def test_they_stand_behind_no_context(settings: dict) -> None:
    setup = replayed(settings)
    replay = setup.replay
    assert replay is not None
    assert len(replay.prompts) == 160
    for prompt, text in zip(replay.prompts, prompts_of(BUILT_IN), strict=True):
        assert prompt.context == WITHOUT
        assert prompt.student_ids == setup.chat.student_ids([user(text)])
        assert [*replay.prefix, *prompt.teacher_ids] == prompt.student_ids
    assert prepare(TrainConfig(**settings), for_training=True).replay is None
    assert prepare(TrainConfig(**settings | {"replay_share": 0.25})).replay is None, "to measure"
    assert replayed(settings, [{"prompt": "a"}]).fingerprint != setup.fingerprint


def test_what_is_measured_is_not_replayed(settings: dict) -> None:
    for word in ("CAT ", "pear"):
        with pytest.raises(
            InputError, match=r"again.jsonl:2: a prompt that is replayed must not be"
        ):
            replayed(settings, [{"prompt": "Good day"}, {"prompt": word}])
    elsewhere = prompts_of(ELSEWHERE)[0]
    with pytest.raises(
        InputError, match="got 1 of 1 that stand in validation or test data or else"
    ):
        replayed(settings, [{"prompt": elsewhere}], elsewhere_prompts=300)
    setup = replayed(settings, [{"prompt": "red"}, {"prompt": "Good day"}])
    assert "again.jsonl: 1 of 2 replayed prompts are training prompts as well" in setup.remarks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replay_share": 1.5}, "replay_share must lie between 0 and 1, got 1.5"),
        ({"replay_share": 0, "replay_data": "x"}, "must come with a replay_share above 0, got 0"),
        ({"teacher": "other"}, "replay_share must go without a teacher of its own"),
        ({"source": "recorded"}, "replay_share must be 0.0 or left out with source recorded"),
    ],
)
def test_settings_that_contradict_it(settings: dict, change: dict, message: str) -> None:
    del settings["guided_share"]
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings | {"replay_share": 0.25} | change).check()


def test_one_that_does_not_fit_is_refused(settings: dict) -> None:
    with pytest.raises(
        InputError, match=r"a replayed prompt and its completion \(32 tokens\) must fi"
    ):
        replayed(settings, [{"prompt": "Good day"}, {"prompt": "x" * 490}])


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.25, 4), (0.5, 8), (1.0, 16)])
def test_how_many_of_a_step(settings: dict, share: float, count: int) -> None:
    config = TrainConfig(**settings | {"prompts_per_step": 16, "replay_share": share})
    assert config.replayed == count
    assert config.of_task().prompts_per_step == 16 - count
    assert config.of_task().of_task() == config.of_task()
