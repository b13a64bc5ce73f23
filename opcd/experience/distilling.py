"""Distilling a round's contexts: a training run like any other, in the round's folder."""

import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from opcd.errors import InputError
from opcd.experience.contexts import kind_of
from opcd.experience.folder import Given
from opcd.experience.measuring import Bench, placement
from opcd.runtime.files import write_json, write_jsonl
from opcd.runtime.progress import Progress
from opcd.tasks.contexts import read_contexts
from opcd.tasks.data import Example, request_of
from opcd.tasks.messages import user, words_of
from opcd.training.run import train

Shown = Callable[[], AbstractContextManager[Progress]]


class Stopped(Exception):
    """A distillation was ended, and saved."""


class Distilling:
    """Moves contexts into weights; what it tells goes to `shown`, which may stop it."""

    def __init__(self, given: Given, bench: Bench, shown: Shown) -> None:
        self._config, self._folder = given.settings.training, given.folder
        self._exercises = given.exercises
        self._bench, self._shown = bench, shown

    def run(
        self,
        number: int,
        model: str,
        contexts: Sequence[Path],
        run: Path,
        **changed: Any,
    ) -> None:
        """Distil contexts into a model, which `run`/final then holds; goes on where it was killed.

        Raises Stopped where it was ended before, and Diverged.
        """
        self._bench.release()
        context, prompts, problems = self._files(number, contexts)
        config = replace(
            self._config,
            model=model,
            context=str(context),
            context_placement=placement(self._config, kind_of(contexts[0])),
            prompts=str(prompts),
            validation_data=None,
            test_data=None,
            test_sets={},
            held_out_share=0.0,
            elsewhere_prompts=0,
            scorer="exact",
            output_dir=str(run),
            seed=_seed(self._config.seed, number),
            **self._exercises.changes,
            **changed,
        )
        resume, source = (run / "config.yaml").is_file(), self._exercises.source(problems)
        with self._shown() as progress:
            outcome = train(config, resume, progress, source=source)
        if outcome.stopped:
            raise Stopped(outcome.stopped)

    def _files(self, number: int, contexts: Sequence[Path]) -> tuple[Path, Path, list[Example]]:
        """Contexts as one file, and the training prompts without those that a context shows, also
        in an earlier turn, as a file and as they are.

        Of several contexts each prompt names one, drawn by its words.
        """
        folder = self._folder / f"round-{number}"
        shown = {_asked(text) for path in contexts for text in _users(path)}
        rows, train = [], self._exercises.parts.train
        problems = [problem for problem in train if not shown & _turns(problem)]
        for problem in problems:
            row: dict[str, Any] = {"messages": list(problem.messages)}
            if len(contexts) > 1:
                drawn = random.Random(f"{self._config.seed} {number} {request_of(problem)}")
                row["context"] = drawn.choice(contexts).stem
            rows.append(row)
        if not rows:
            raise InputError(
                f"training prompts must be left beside those that the experience shows, got none "
                f"of {len(train)}; add problems, or lower context_tokens"
            )
        prompts = folder / "prompts.jsonl"
        write_jsonl(prompts, rows)
        if len(contexts) == 1:
            return contexts[0], prompts, problems
        several = folder / "experiences.json"
        write_json(several, {path.stem: _messages(path) for path in contexts})
        return several, prompts, problems


def _seed(seed: int, number: int) -> int:
    """A run's own: rounds draw otherwise from the same prompts."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _messages(path: Path) -> list[Any]:
    return read_contexts(str(path))[0][""].messages


def _users(path: Path) -> list[str]:
    """The problems that a context shows."""
    return [m["content"] for m in _messages(path) if m["role"] == "user"]


def _turns(problem: Example) -> set[tuple[str, str]]:
    """What a problem asks, turn by turn."""
    return {_asked(words_of(m)) for m in problem.messages if m["role"] == "user"}


def _asked(text: str) -> tuple[str, str]:
    """What makes two problems the same in what they ask last."""
    return request_of(Example((user(text),), (), ""))
