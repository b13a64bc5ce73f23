"""Completions that the prompted teacher wrote, or that came from a file, kept with the run.

`guided.jsonl` in the run's folder: its first line says by what rule they were made, each other one
is a completion. One completion a prompt and sample is made, those of many steps at once; where a
prompt comes again, in a later epoch or in a resumed run, so does its completion.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from opcd.config import TrainConfig
from opcd.episodes import Episode, Prompt
from opcd.errors import InputError
from opcd.models.digest import model_digest
from opcd.models.lm import causal_lm
from opcd.rollouts.choice import build_engine
from opcd.rollouts.noise import GUIDED, streams
from opcd.rollouts.protocol import RolloutEngine, SamplingParams
from opcd.runtime.strict_json import parse_json
from opcd.tasks.task import Task
from opcd.teacher import SharedPrefixTeacher

FILE = "guided.jsonl"


def teacher_engine(teacher: SharedPrefixTeacher, config: TrainConfig) -> RolloutEngine:
    """What samples from the teacher, apart from the student's engine: no graph is made twice."""
    with teacher.frozen():
        return build_engine(
            config.rollout_engine,
            teacher.model,
            config.rollout_batch_size,
            teacher.plan,
            config.max_tokens_per_pass,
        )


class GuidedCompletions(Protocol):
    """Completions of prompts by somebody else than the student."""

    def prepare(self, needed: Sequence[Prompt], ahead: Callable[[], list[Prompt]]) -> None:
        """Have the needed ones at hand; what is made for that is made for those `ahead` as well."""
        ...

    def episode(self, prompt: Prompt, sample: int, epoch: int = 0) -> Episode:
        """One completion; how it is scored is the source's to say."""
        ...


class TeacherCompletions:
    """What the teacher says with the context in view."""

    def __init__(
        self,
        teacher: SharedPrefixTeacher,
        engine: RolloutEngine,  # see `teacher_engine`
        task: Task,
        config: TrainConfig,
        params: SamplingParams,  # of training
        folder: Path,
    ) -> None:
        self._teacher = teacher
        self._engine = engine
        self._task = task
        self._config = config
        self._params = params
        self._file = folder / FILE
        self._rule = {
            "rule": "one completion a prompt and sample, used again whenever the prompt is guided",
            "teacher": model_digest(config.teacher or config.model),
            "seed": config.seed,
            "temperature": config.temperature,
            "max_completion_tokens": config.max_completion_tokens,
            "contexts": task.context_digests,
            **({"stop": config.stop} if config.stop else {}),
        }
        self._kept = self._read()

    def prepare(self, needed: Sequence[Prompt], ahead: Callable[[], list[Prompt]]) -> None:
        """See GuidedCompletions.prepare. Large batches; a context's share its prefix."""
        if not self._missing(needed):
            return
        by_context: dict[str, list[Prompt]] = {}
        for prompt in self._missing([*needed, *ahead()]):
            by_context.setdefault(prompt.context, []).append(prompt)
        device = causal_lm(self._teacher.model).device
        with self._teacher.frozen(), torch.autocast(device.type, enabled=False):
            rows = [row for prompts in by_context.values() for row in self._made(prompts)]
        self._engine.close()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                if file.tell() == 0:
                    file.write(json.dumps(self._rule) + "\n")
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise InputError(
                f"guided completions must be written to {self._file}, got {error.strerror}; make "
                f"room and resume the run"
            ) from error
        self._kept |= {(row["key"], row["sample"]): row for row in rows}

    def _missing(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        n = self._config.completions_per_prompt
        distinct = {prompt.key: prompt for prompt in prompts}
        return [
            prompt
            for key, prompt in distinct.items()
            if any((key, sample) not in self._kept for sample in range(n))
        ]

    def _made(self, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """All samples of prompts that stand behind one context."""
        n = self._config.completions_per_prompt
        repeated = [p for p in prompts for _ in range(n)]
        ids = [self._task.prompted_ids(p) for p in repeated]
        numbers = streams(self._config.seed, GUIDED, prompts, n)
        rollouts = self._engine.generate(ids, self._params, numbers)
        return [
            {
                "key": prompt.key,
                "sample": i % n,
                "completion_token_ids": rollout.completion_token_ids,
                "finish": rollout.finish_reason,
            }
            for i, (prompt, rollout) in enumerate(zip(repeated, rollouts, strict=True))
        ]

    def episode(self, prompt: Prompt, sample: int, epoch: int = 0) -> Episode:
        """See GuidedCompletions.episode."""
        row = self._kept[prompt.key, sample]
        return Episode.of_completion(prompt, row["completion_token_ids"], row["finish"])

    def _read(self) -> dict[tuple[int, int], dict[str, Any]]:
        lines = _whole_lines(self._file) if self._file.exists() else []
        if not lines:
            return {}
        rule, *rows = lines
        if rule.get("teacher") == (self._config.teacher or self._config.model):
            rule["teacher"] = self._rule["teacher"]  # versions before wrote its name
        if rule != self._rule:
            names = [*dict.fromkeys([*self._rule, *rule])]
            differing = [k for k in names if rule.get(k) != self._rule.get(k)]
            raise InputError(
                f"{self._file} must hold completions made by the rule of this run, got another "
                f"{', '.join(differing)}; delete the file, or start another output_dir"
            )
        return {(row["key"], row["sample"]): row for row in rows}


class StoredCompletions:
    """Completions from a file."""

    def __init__(
        self,
        completions: Mapping[int, list[list[int]]],  # by the prompt's key
        each: int = 1,  # samples of a prompt that an epoch takes
    ) -> None:
        self._completions, self._each = completions, each

    def prepare(self, needed: Sequence[Prompt], ahead: Callable[[], list[Prompt]]) -> None:
        """Nothing is left to do."""

    def episode(self, prompt: Prompt, sample: int, epoch: int = 0) -> Episode:
        """See GuidedCompletions.episode. An epoch goes on where the one before ended."""
        found = self._completions[prompt.key]
        return Episode.of_completion(prompt, found[(epoch * self._each + sample) % len(found)])


def _whole_lines(file: Path) -> list[Any]:
    """The JSON of each line; a last one that a kill cut off is left out, also from the file."""
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [parse_json(line) for line in whole.splitlines()]
