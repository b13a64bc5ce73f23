"""The Python interface: distil a context into a model, or score one."""

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opcd.api.inputs import write_context, write_model, write_rows
from opcd.api.results import Distilled, Evaluated
from opcd.config.settings import gather
from opcd.errors import InputError
from opcd.models.by_name import load_model
from opcd.runtime.files import make_folder
from opcd.runtime.interrupts import Interrupts
from opcd.runtime.progress import Progress
from opcd.training.evaluate import evaluate_run
from opcd.training.run import train

Context = str | Path | Sequence[Mapping[str, Any]] | Mapping[str, Any]
Rows = Path | Iterable[str | Sequence[Mapping[str, Any]] | Mapping[str, Any]]
Callback = Callable[[dict[str, Any]], object]


class Stopped(KeyboardInterrupt):
    """A run was interrupted, and saved: distil again with its `folder` and `resume=True`."""

    def __init__(self, folder: Path, step: int, why: str) -> None:
        super().__init__(
            f"stopped by {why} after step {step}; checkpoint saved. Continue with "
            f"output_dir={str(folder)!r}, resume=True"
        )
        self.folder = folder


def distill(
    model: str | Path | PreTrainedModel,
    context: Context,
    prompts: Rows,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation_data: Rows | None = None,
    test_data: Rows | None = None,
    output_dir: str | Path | None = None,
    preset: str | None = None,
    resume: bool = False,
    in_place: bool = False,
    on_step: Callback | None = None,
    on_validation: Callback | None = None,
    **settings: Any,
) -> Distilled:
    """Move a context into a model's weights, and measure it where there is `test_data`.

    model: a Hugging Face name, a folder, or a loaded model with its `tokenizer`. A loaded model is
        written to the run's folder first, and never changed unless `in_place`, which puts the
        distilled weights into it at the end.
    context: the text itself, chat messages, or the `Path` of a file; a dict of these by name for
        several contexts.
    prompts, validation_data, test_data: requests, each a string, a list of messages or a dict like
        a row of a JSONL file ("prompt" or "messages", "answer" where it is judged, "context" where
        there are several); also a `datasets.Dataset`, or the `Path` of a file.
    output_dir: the run's folder, as `opcd train` writes it; without one a temporary folder, which
        is there as long as the returned object.
    on_step, on_validation: called with a step's metrics, and after a validation with the same and
        "validation" in it; a string that is returned ends the run, saved, with `Stopped`.
    settings: fields of the configuration, see `opcd train --help`.

    Ctrl-C lets a step finish, saves, and raises `Stopped` (in the main thread). Raises InputError
    for whatever does not fit, before weights are loaded where that can be known.
    """
    with _folder(output_dir) as (folder, kept), _as_found():
        given = _given(folder, model, tokenizer, context, settings, resume)
        if in_place and not isinstance(model, torch.nn.Module):
            raise InputError("in_place needs a loaded model, got a name; leave it out")
        for name, rows in (
            ("prompts", prompts),
            ("validation_data", validation_data),
            ("test_data", test_data),
        ):
            if rows is not None:
                given[name] = write_rows(rows, folder / "inputs" / f"{name}.jsonl", name)
        config = gather(given, preset=preset, caller="Python")
        with Interrupts(print) as interrupts:
            told = _Told(interrupts, on_step, on_validation)
            outcome = train(config, resume, told)
        if outcome.stopped:
            raise Stopped(folder, outcome.steps_done, outcome.stopped)
        distilled = Distilled(folder, kept)
        if in_place:
            assert isinstance(model, PreTrainedModel)
            model.load_state_dict(load_model(str(folder / "final"), "auto").state_dict())
            distilled = Distilled(folder, kept, model)
        return distilled


def evaluate(
    model: str | Path | PreTrainedModel,
    context: Context,
    test_data: Rows,
    *,
    distilled: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | Path | None = None,
    preset: str | None = None,
    **settings: Any,
) -> Evaluated:
    """Score a model without and with the context, and one `distilled` from it where it is named.

    Arguments are those of `distill`. Raises InputError for whatever does not fit.
    """
    with _folder(output_dir) as (folder, kept), _as_found():
        given = _given(folder, model, tokenizer, context, settings, resume=False)
        given["test_data"] = write_rows(
            test_data, folder / "inputs" / "test_data.jsonl", "test_data"
        )
        config = gather(given, preset=preset, caller="Python")
        name = "none" if distilled is None else str(distilled)
        where, _ = evaluate_run(config, name, str(folder / "scored"))
        return Evaluated(where, kept)


class _Told(Progress):
    """Hands metrics to callbacks, and ends a run that they or a signal want to end."""

    def __init__(
        self, interrupts: Interrupts, on_step: Callback | None, on_validation: Callback | None
    ) -> None:
        self._interrupts = interrupts
        self._on_step, self._on_validation = on_step, on_validation
        self._why: str | None = None

    def part(self, note: str, metrics: dict[str, Any] | None = None) -> None:
        """See Progress.part."""
        if metrics is None:
            return
        for callback, wanted in (
            (self._on_step, True),
            (self._on_validation, "validation" in metrics),
        ):
            said = callback(metrics) if callback is not None and wanted else None
            self._why = said if isinstance(said, str) else self._why

    def stop(self) -> str | None:
        """See Progress.stop."""
        caught = self._interrupts.caught
        return caught.name if caught else self._why


def _given(
    folder: Path,
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    context: Context,
    settings: Mapping[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """Settings, with what is no file written to the run's folder."""
    inputs = folder / "inputs"
    return {
        **{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()},
        "output_dir": str(folder),
        "model": write_model(model, tokenizer, inputs / "model", keep=resume),
        "context": write_context(context, inputs),
    }


@contextlib.contextmanager
def _folder(
    output_dir: str | Path | None,
) -> Iterator[tuple[Path, tempfile.TemporaryDirectory[str] | None]]:
    """The run's folder; a temporary one goes with an error."""
    if output_dir is not None:
        yield make_folder(Path(output_dir)), None
        return
    kept = tempfile.TemporaryDirectory(prefix="opcd-")
    try:
        yield Path(kept.name), kept
    except Stopped:
        kept._finalizer.detach()  # type: ignore[attr-defined]  # it can be continued
        raise
    except BaseException:
        kept.cleanup()
        raise


@contextlib.contextmanager
def _as_found() -> Iterator[None]:
    """Random generators, gradient mode and threads are the caller's again where it ends."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    state, threads = random.getstate(), torch.get_num_threads()
    try:
        with torch.random.fork_rng(list(devices)), torch.enable_grad():
            yield
    finally:
        random.setstate(state)
        torch.set_num_threads(threads)
