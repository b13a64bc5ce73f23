"""What is known of rivals before any is trained: which are meant, and whether a task suits them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from opcd.config import TrainConfig
from opcd.config.settings import gather, write_config
from opcd.errors import InputError, did_you_mean
from opcd.evaluation.measured import measured_by
from opcd.runtime.files import file_digest, write_json
from opcd.studies import compression
from opcd.studies.catalogue import COMPRESSED, NAMES, REFERENCE, SOFT
from opcd.tasks.prepare import Setup, prepare


def checked_task(config: TrainConfig) -> Setup:
    """The task, before anything is trained. Raises InputError for one that rivals cannot share."""
    setup = prepare(config, for_training=True)
    if len(setup.chats) > 1 or setup.task.tools or config.source != "sampled":
        raise InputError(
            "rivals need one context without tools, and sampled completions, got several contexts, "
            "tools or source recorded; take them apart"
        )
    if config.eval_temperature:
        raise InputError(
            f"rivals are scored by their likeliest answers, got eval_temperature "
            f"{config.eval_temperature}; set it to 0"
        )
    if config.max_minutes is not None:
        raise InputError(
            f"rivals are compared after as many steps, got max_minutes {config.max_minutes:g}, "
            f"which would end the slower ones earlier; leave it out"
        )
    if config.teacher is not None:
        raise InputError(f"rivals have one model, got the teacher {config.teacher!r}; leave it out")
    if not setup.task.test:
        raise InputError("rivals need test data, got none; name a file as test_data")
    if config.guided_completions is not None:
        raise InputError(
            "rivals learn from the teacher's own completions, got guided_completions; leave it out"
        )
    return setup


def hindrances(setup: Setup, other_context: str | None) -> dict[str, str]:
    """What each rival that cannot be run would need, and what to do about it."""
    found = {}
    if not any(len(case.example.messages) == 1 for case in setup.task.training):
        found["demonstrations"] = "training prompts of one message, got none; leave it out"
    if (lacking := compression.lacking(setup.chat.context)) is not None:
        found |= dict.fromkeys(COMPRESSED, lacking)
    context_tokens = len(setup.task.a_prefix)
    for name, tokens in SOFT.items():
        if tokens >= context_tokens:
            found[name] = (
                f"a context longer than its {tokens} vectors, got {context_tokens} tokens; leave "
                f"it out"
            )
    if other_context is None:
        found["other_context"] = (
            "another task's context, got none; name a file with --other_context"
        )
    return found


def chosen_rivals(wanted: Sequence[str], hindered: Mapping[str, str]) -> list[str]:
    """The names in their order, the reference first; by default all that nothing hinders.

    Raises InputError for others, and for one that is wanted by name but hindered.
    """
    for name in wanted:
        if name not in NAMES:
            raise InputError(
                f"a rival must be one of {', '.join(NAMES)}, got {name!r}"
                f"{did_you_mean(name, NAMES)}"
            )
        if name in hindered:
            raise InputError(f"the rival {name} needs {hindered[name]}")
    chosen = set(wanted) or set(NAMES) - set(hindered)
    return [name for name in NAMES if name in chosen | {REFERENCE}]


def check_other(setup: Setup, context: str | None) -> str:
    """The digest of a control's context. Raises InputError for one that cannot stand in the task's
    place, or is it."""
    assert context is not None
    other = prepare(replace(setup.config, context=context), for_training=True)
    if len(other.chats) > 1 or other.task.tools:
        raise InputError(
            f"other_context must be one context without tools, got {context!r} with several, or "
            f"with tools; name another file"
        )
    if other.task.context_digests == setup.task.context_digests:
        raise InputError(
            f"other_context must be another task's, got the same as context in {context!r}: "
            f"nothing would be controlled; name another file"
        )
    return file_digest(Path(context))


def check_inputs(setup: Setup, folder: Path) -> None:
    """Raise InputError if the files or models behind a study's rows have changed.

    Their digests are kept beside the rows.
    """
    file = folder / "inputs.json"
    now = {
        "prompts": setup.fingerprint,
        "validation_data": setup.selection_fingerprint,
        **measured_by(setup),
    }
    before = json.loads(file.read_text("utf-8")) if file.is_file() else now
    if differing := [what for what in now if before.get(what) != now[what]]:
        called = ("context or chat template" if what == "form" else what for what in differing)
        raise InputError(
            f"{folder} must hold rivals of these files, got others of {', '.join(called)}; name "
            f"another output_dir"
        )
    write_json(file, now)


def same_settings(config: TrainConfig, folder: Path) -> TrainConfig:
    """The settings of a study, kept beside its rows. Raises InputError for others than those."""
    file = folder / "config.yaml"
    if file.is_file():
        saved = gather({}, file)
        config = replace(config, today=config.today and saved.today)
        if differing := saved.differing_fields(config):
            raise InputError(
                f"{folder} must hold rivals of these settings, got others of "
                f"{', '.join(differing)}; name another output_dir"
            )
    write_config(config, file)
    return config
