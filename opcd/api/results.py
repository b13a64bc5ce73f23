"""What distilling and evaluating return: a folder, and what is read from it."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opcd.errors import InputError
from opcd.evaluation.evaluate import read_scorecard
from opcd.models.by_name import load_model, load_tokenizer
from opcd.runtime.files import read_jsonl, read_metrics
from opcd.runtime.untrusted import check_run_folder


class Evaluated:
    """A scorecard, and the folder that holds it."""

    def __init__(
        self, folder: str | Path, kept: tempfile.TemporaryDirectory[str] | None = None
    ) -> None:
        self.folder = Path(folder).expanduser()
        self._kept = kept  # a temporary folder is there as long as this object

    @property
    def scorecard(self) -> dict[str, Any] | None:
        """What scorecard.json holds; None where there was no test data."""
        return read_scorecard(self.folder)

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Every answer that the scorecard was made from, a test request each."""
        return read_jsonl(self.folder / "answers.jsonl")

    def report(self) -> str:
        """The report as Markdown; "" where there was no test data."""
        file = self.folder / "report.md"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def __repr__(self) -> str:
        reached = ""
        if card := self.scorecard:
            columns = card["contenders"]
            judged = "accuracy" in columns["base"]
            shares = {
                name: column["accuracy"] if judged else column["greedy_agreement"]["mean"]
                for name, column in columns.items()
            }
            listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            reached = listed if judged else f"answers as the prompted model's: {listed}"
        return f"{type(self).__name__}({str(self.folder)!r}: {reached or 'not scored'})"


class Distilled(Evaluated):
    """A distilled model, and what is known of it; ``Distilled(folder)`` opens a run again."""

    def __init__(
        self,
        folder: str | Path,
        kept: tempfile.TemporaryDirectory[str] | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(folder, kept)
        self._model = model
        if not (self.folder / "final").is_dir():
            raise InputError(
                f"the folder must be that of a run with a model, got {str(self.folder)!r}; a run "
                f"that was interrupted goes on with resume=True"
            )

        check_run_folder(self.folder)

    @property
    def model(self) -> PreTrainedModel:
        """On the CPU in the dtype of its files; with `in_place` the model that was given."""
        if self._model is None:
            self._model = load_model(str(self.folder / "final"), "auto")
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with its chat template."""
        return load_tokenizer(str(self.folder / "final"))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Those of every step, as in metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    def save(self, folder: str | Path) -> Path:
        """Copy the model to `folder`, which must not be there yet; returns its path."""
        target = Path(folder).expanduser()
        if target.exists():
            raise InputError(f"the folder must not be there yet, got {str(target)!r}; name another")
        shutil.copytree(self.folder / "final", target)
        return target
