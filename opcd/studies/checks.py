"""What is known of rivals before any is trained: which are meant, and whether a task suits them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from opcd.config import TrainConfig
from opcd.config.settings import gather, write_config
from opcd.errors import InputError, did_you_mean
from opcd.runtime.files import file_digest
from opcd.studies import compression
from opcd.studies.catalogue import COMPRESSED, NAMES, REFERENCE, SOFT
from opcd.studies.compression import check_installed
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
    if config.teacher is not None:
        raise InputError(f"rivals have one model, got the teacher {config.teacher!r}; leave it out")
    if not setup.task.test:
        raise InputError("rivals need test data, got none; name a file as test_data")
    if config.guided_completions is not None:
        raise InputError(
            "rivals learn from the teacher's own completions, got guided_completions; leave it out"
        )
    return setup


def chosen_rivals(
    wanted: Sequence[str], other_context: str | None, context_tokens: int
) -> list[str]:
    """The names in their order, the reference first. Raises InputError for others."""
    for name in wanted:
        if name not in NAMES:
            raise InputError(
                f"a rival must be one of {', '.join(NAMES)}, got {name!r}"
                f"{did_you_mean(name, NAMES)}"
            )
    if "other_context" in wanted and other_context is None:
        raise InputError(
            "the rival other_context needs another task's context, got none; name a file with "
            "--other_context"
        )
    left_out = {name for name, tokens in SOFT.items() if tokens >= context_tokens}
    left_out |= set() if other_context is not None else {"other_context"}
    left_out |= set() if compression.is_installed() else set(COMPRESSED)
    for name in wanted:
        if name in COMPRESSED:
            check_installed(name)
    chosen = set(wanted) or set(NAMES) - left_out
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
