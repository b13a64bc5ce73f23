"""The Python interface: look at a context, distil it into a model, or score one."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opcd.api.caller import as_found
from opcd.api.inputs import Inputs
from opcd.api.results import Distilled, Evaluated
from opcd.config.fields import FIELDS, MEASURING
from opcd.config.settings import FILES_BY_NAME, gather
from opcd.errors import InputError
from opcd.models.by_name import load_model
from opcd.preflight.check import Checked
from opcd.preflight.check import check as run_check
from opcd.runtime.files import free_name, make_folder
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import prepare
from opcd.terminal import Silent, Terminal
from opcd.training.checkpoint import list_checkpoints
from opcd.training.duration import expected_seconds
from opcd.training.evaluate import evaluate_run
from opcd.training.run import train

log = logging.getLogger(__name__)

REPLAYED = "replay_data"
Context = str | Path | Sequence[Mapping[str, Any]] | Mapping[str, Any]
Rows = Path | Iterable[str | Sequence[Mapping[str, Any]] | Mapping[str, Any]]
Callback = Callable[[dict[str, Any]], object]


class Stopped(KeyboardInterrupt):
    """A run was interrupted, and saved: distil again with its `folder` and `resume=True`.

    `why` names the signal, or the alarm with ``on_alarm="stop"``, or is what a callback returned.
    """

    def __init__(self, folder: Path, step: int, why: str) -> None:
        super().__init__(folder, step, why)
        self.folder, self.step, self.why = folder, step, why

    def __str__(self) -> str:
        return (
            f"stopped by {self.why} after step {self.step}; checkpoint saved. Continue with "
            f"output_dir={str(self.folder)!r}, resume=True"
        )


def distill(
    model: str | Path | PreTrainedModel,
    context: Context,
    prompts: Rows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation_data: Rows | None = None,
    test_data: Rows | None = None,
    elsewhere_data: Rows | None = None,
    output_dir: str | Path | None = None,
    preset: str | None = None,
    resume: bool = False,
    in_place: bool = False,
    on_step: Callback | None = None,
    on_validation: Callback | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Distilled:
    """Move a context into a model's weights, and measure it on `test_data` or prompts kept out.

    model: a Hugging Face name, a folder, or a loaded model with its `tokenizer`. A loaded model is
        written to the run's folder first, and never changed unless `in_place`, which puts the
        distilled weights into it at the end, and the tokens that end its answers.
    context: the text itself, chat messages, ``{"messages": [...], "tools": [...]}``, or the `Path`
        of a file; a dict of these by name for several contexts.
    prompts, validation_data, test_data, elsewhere_data: requests, each a string, a list of messages
        or a dict like a row of a JSONL file ("prompt" or "messages", "answer" where it is judged,
        "context" where there are several); also a `datasets.Dataset`, or the `Path` of a file.
    output_dir: the run's folder, as `opcd train` writes it; without one a temporary folder, which
        is there as long as the returned object.
    on_step, on_validation: called with a step's metrics, and after a validation with the same and
        "validation" in it. True ends training, with a model; a string ends it as an interrupt
        does, with `Stopped`.
    quiet: print neither the run's plan and notes nor its progress.
    settings: fields of the configuration, see `opcd train --help`. In `replay_data` and the values
        of `test_sets` rows may stand as above, and a string is the name of a file.

    Ctrl-C lets a step finish, saves, and raises `Stopped` (in the main thread). Raises InputError
    for whatever does not fit, before weights are loaded where that can be known.
    """
    for callback in (on_step, on_validation):
        if callback is not None and not callable(callback):
            raise InputError(f"a callback must be a function, got {callback!r}")
    if in_place and not isinstance(model, PreTrainedModel):
        raise InputError("in_place needs a loaded model, got a name; leave it out")
    parts = {
        "prompts": prompts,
        "validation_data": validation_data,
        "test_data": test_data,
        "elsewhere_data": elsewhere_data,
    }
    with _folder(output_dir) as (folder, kept), as_found():
        inputs = Inputs(folder / "inputs")
        with (Silent if quiet else Terminal)() as shown:
            told = _Told(shown, on_step, on_validation)
            try:
                given = _given(inputs, folder, model, tokenizer, context, parts, settings)
                outcome = train(gather(given, preset=preset, caller="Python"), resume, told)
            except InputError:
                if not told.began:
                    inputs.discard()
                raise
        if outcome.stopped:
            raise Stopped(folder, outcome.steps_done, outcome.stopped)
        if not in_place:
            return Distilled(folder, kept)
        assert isinstance(model, PreTrainedModel)
        made = load_model(str(folder / "final"), "auto")
        model.load_state_dict(made.state_dict())
        model.generation_config.eos_token_id = made.generation_config.eos_token_id
        return Distilled(folder, kept, model)


def check(
    model: str | Path | PreTrainedModel,
    context: Context,
    prompts: Rows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation_data: Rows | None = None,
    test_data: Rows | None = None,
    output_dir: str | Path | None = None,
    expected_requests: float | None = None,
    preset: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Checked:
    """Look at a context before any training: `verdict.word` is "go", or says what speaks against.

    Arguments are those of `distill`; `expected_requests` is how many come between two changes of
    the context. Measured on a sample of the validation data, or of the prompts where nothing says
    which answers are right. With `output_dir` all figures are kept in its check.json, which the
    report of a run there repeats. Raises InputError for whatever does not fit.
    """
    parts = {"prompts": prompts, "validation_data": validation_data, "test_data": test_data}
    with _folder(output_dir) as (folder, kept), as_found():
        inputs = Inputs(folder / "inputs")
        with (Silent if quiet else Terminal)(finishes_steps=False) as shown:
            try:
                given = _given(inputs, folder, model, tokenizer, context, parts, settings)
                setup = prepare(gather(given, preset=preset, caller="Python"), for_training=True)
                found = run_check(setup, lambda: expected_seconds(setup), shown, expected_requests)
            except InputError:
                inputs.discard()
                raise
        if kept is None:
            found.write(folder)
        return found


def evaluate(
    model: str | Path | PreTrainedModel,
    context: Context,
    test_data: Rows,
    *,
    distilled: str | Path | Distilled | None = None,
    elsewhere_data: Rows | None = None,
    contenders: Mapping[str, str | Path] | None = None,
    served_model: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | Path | None = None,
    preset: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Evaluated:
    """Score a model without and with the context, and one `distilled` from it where it is named.

    contenders: who else answers, by name: the folder of a model, of an adapter or of a soft prompt,
        the file of a prompt, or the address of a server (http://127.0.0.1:8000/v1), of whose models
        `served_model` names one.

    Other arguments are those of `distill`. Raises InputError for whatever does not fit.
    """
    training = sorted(name for name in settings if name in FIELDS and name not in MEASURING)
    if training:
        raise InputError(
            f"{', '.join(training)}: for training, and nothing to do in evaluate; leave it out"
        )
    name = str(distilled.folder / "final" if isinstance(distilled, Distilled) else distilled)
    with _folder(output_dir) as (folder, kept), as_found():
        inputs = Inputs(folder / "inputs")
        with (Silent if quiet else Terminal)(finishes_steps=False) as shown:
            try:
                parts = {"test_data": test_data, "elsewhere_data": elsewhere_data}
                given = _given(inputs, folder, model, tokenizer, context, parts, settings)
                config = gather(given, preset=preset, caller="Python")
                target = free_name(folder / "scored")
                where, _ = evaluate_run(
                    config,
                    "none" if distilled is None else name,
                    str(target),
                    shown,
                    {who: str(what) for who, what in (contenders or {}).items()},
                    served_model,
                )
            except InputError:
                inputs.discard()
                raise
        return Evaluated(where, kept)


class _Told(Progress):
    """Shows a run, hands its metrics to callbacks, and ends it where they or a signal want it."""

    def __init__(
        self, shown: Progress, on_step: Callback | None, on_validation: Callback | None
    ) -> None:
        self._shown = shown
        self._on_step, self._on_validation = on_step, on_validation
        self._why: str | None = None
        self._enough = False
        self.began = False

    def say(self, text: str) -> None:
        """See Progress.say."""
        self._shown.say(text)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """See Progress.begin."""
        self.began = True
        self._shown.begin(what, total, done)

    def part(self, note: str, metrics: dict[str, Any] | None = None) -> None:
        """See Progress.part."""
        self._shown.part(note, metrics)
        if metrics is None:
            return
        self._call(self._on_step, metrics)
        if "validation" in metrics:
            self.validated(metrics)

    def validated(self, metrics: dict[str, Any]) -> None:
        """See Progress.validated."""
        self._call(self._on_validation, metrics)

    def _call(self, callback: Callback | None, metrics: dict[str, Any]) -> None:
        said = callback(metrics) if callback is not None else None
        self._why = said if isinstance(said, str) else self._why
        # numpy's and torch's truth, too; what else a callback happens to return says nothing.
        truth = said is True or str(getattr(said, "dtype", "")).endswith("bool")
        self._enough |= truth and bool(said)

    def end(self) -> None:
        """See Progress.end."""
        self._shown.end()

    def stop(self) -> str | None:
        """See Progress.stop."""
        return self._shown.stop() or self._why

    def enough(self) -> bool:
        """See Progress.enough."""
        return self._enough


def _given(
    inputs: Inputs,
    folder: Path,
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    context: Context,
    parts: Mapping[str, Rows | None],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Settings, with what is no file written as one."""

    def file(value: Any, name: str) -> str:
        return str(value) if isinstance(value, str | Path) else inputs.rows(value, name)

    of_settings = {n: str(v) if isinstance(v, Path) else v for n, v in settings.items()}
    if of_settings.get(REPLAYED) is not None:
        of_settings[REPLAYED] = file(of_settings[REPLAYED], REPLAYED)
    for name in FILES_BY_NAME:
        if isinstance(sets := of_settings.get(name), Mapping):
            of_settings[name] = {own: file(rows, name) for own, rows in sets.items()}
    return {
        **of_settings,
        "output_dir": str(folder),
        "context": inputs.context(context),
        **{name: inputs.rows(rows, name) for name, rows in parts.items() if rows is not None},
        "model": inputs.model(model, tokenizer),
    }


@contextlib.contextmanager
def _folder(
    output_dir: str | Path | None,
) -> Iterator[tuple[Path, tempfile.TemporaryDirectory[str] | None]]:
    """The run's folder; a temporary one stays where an error leaves something to continue."""
    if output_dir is not None:
        yield make_folder(Path(output_dir).expanduser()), None
        return
    kept = tempfile.TemporaryDirectory(prefix="opcd-")
    try:
        yield Path(kept.name), kept
    except BaseException:
        folder = Path(kept.name)
        if list_checkpoints(folder / "checkpoints") or (folder / "final").is_dir():
            kept._finalizer.detach()  # type: ignore[attr-defined]
            log.warning("the run is kept in %s: output_dir=..., resume=True go on", kept.name)
        else:
            kept.cleanup()
        raise
