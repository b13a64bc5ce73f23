"""One message to the model before, with and without the context, and to the one after."""

from collections.abc import Iterator
from pathlib import Path

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.contenders import LoadedModel, load_for_answers
from opcd.evaluation.decoding import answer_params
from opcd.tasks.messages import user
from opcd.tasks.prepare import on_this_machine, prepare


class SideBySide:
    """Base, prompted and distilled, both models in memory."""

    def __init__(self, config: TrainConfig, distilled: Path) -> None:
        if not distilled.is_dir():
            raise InputError(
                f"there must be a distilled model, got no folder {str(distilled)!r}; name the "
                f"folder of a run that has ended"
            )
        self._setup = prepare(on_this_machine(config))
        params = answer_params(self._setup)
        self._models: dict[str, LoadedModel] = {
            "base": load_for_answers(self._setup, config.model, params),
            "distilled": load_for_answers(self._setup, str(distilled), params),
        }

    @property
    def contexts(self) -> list[str]:
        """The names of the run's contexts; one alone is ""."""
        return list(self._setup.chats)

    def ask(self, message: str, context: str | None = None) -> Iterator[tuple[str, str]]:
        """Each contender's name and answer, as it comes; `context` names one of several.

        Raises InputError for a message that does not fit the model.
        """
        if (context is None and len(self.contexts) > 1) or context not in (None, *self.contexts):
            raise InputError(
                f"context must be one of {', '.join(self.contexts)}, got {context!r}; name "
                f"one of them"
            )
        chat = self._setup.chats[self.contexts[0] if context is None else context]
        asked = [user(message)]
        alone, prompted = chat.student_ids(asked), chat.teacher_ids(asked)
        for name, model, ids in (
            ("base", "base", alone),
            ("prompted", "base", prompted),
            ("distilled", "distilled", alone),
        ):
            (answer,) = self._models[model].answers([ids])
            yield name, answer.text

    def close(self) -> None:
        """Free what the engines hold."""
        for model in self._models.values():
            model.engine.close()
