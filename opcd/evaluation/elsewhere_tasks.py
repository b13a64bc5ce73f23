"""What a distilled model became on tasks of lm-eval, which say what is right.

The package is lm-eval's own (the extra `elsewhere`): its tasks, prompts and metrics, without a chat
template unless a task asks for one, so that figures are those that others publish.
"""

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.contenders import LoadedModel
from opcd.evaluation.intervals import PerRequest, paired_difference
from opcd.models.lm import causal_lm

_TASK = re.compile(r"^task:\s*[\"']?([\w.-]+)", re.MULTILINE)


class Tasks(NamedTuple):
    """Tasks by name, and where those of the user's files lie."""

    names: list[str]
    folders: list[str]


class Results(NamedTuple):
    """What a model reached, by task and metric."""

    means: dict[str, dict[str, float]]
    values: dict[str, dict[str, list[float]]]  # of each item, where a metric is their mean


def tasks_of(config: TrainConfig) -> Tasks:
    """The tasks of a configuration. Raises InputError where lm-eval or a file is not there."""
    names: list[str] = []
    folders: list[str] = []
    for name in filter(None, (part.strip() for part in config.elsewhere_tasks.split(","))):
        if not name.endswith((".yaml", ".yml")):
            names.append(name)
            continue
        file = Path(name).expanduser()
        found = _TASK.search(file.read_text(encoding="utf-8")) if file.is_file() else None
        if found is None:
            raise InputError(
                f"elsewhere_tasks must name tasks of lm-eval or YAML files of such, got {name!r}, "
                f"{'which names no task' if file.is_file() else 'which is not there'}; check it"
            )
        names.append(found[1])
        folders.append(str(file.resolve().parent))
    if names and importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "elsewhere_tasks needs the package lm-eval, which is not installed; pip install "
            "'opcd-kernels[elsewhere]', or leave the tasks out"
        )
    if names and (unknown := set(names) - set(_manager(tuple(names), tuple(folders)).all_tasks)):
        raise InputError(
            f"elsewhere_tasks must be tasks of lm-eval, got {', '.join(sorted(unknown))}; "
            f"`lm-eval ls tasks` lists them"
        )
    return Tasks(names, folders)


@lru_cache(maxsize=1)
def _manager(names: tuple[str, ...], folders: tuple[str, ...]) -> Any:
    """lm-eval's, which knows its own tasks unless all that is asked for are files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[*folders] or None, include_defaults=len(folders) < len(names))


def results_of(model: LoadedModel) -> Results:
    """What a model reaches without the context. Raises InputError for tasks that there are not."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    setup = model.setup
    tasks = tasks_of(setup.config)
    manager = _manager(tuple(tasks.names), tuple(tasks.folders))
    wrapped = HFLM(
        pretrained=causal_lm(model.model),
        tokenizer=setup.tokenizer,
        batch_size=setup.config.rollout_batch_size,
    )
    found = lm_eval.simple_evaluate(
        model=wrapped, tasks=tasks.names, task_manager=manager, log_samples=True
    )
    means = {
        task: {
            metric: float(value)
            for metric, value in metrics.items()
            if "_stderr" not in metric and isinstance(value, (int, float))
        }
        for task, metrics in found["results"].items()
    }
    values = {
        task: {metric: _values(found["samples"].get(task, []), metric) for metric in metrics}
        for task, metrics in means.items()
    }
    return Results(means, values)


def _values(samples: list[dict[str, Any]], metric: str) -> list[float]:
    """A metric ("acc,none": its name and its filter) of each item; [] where items have none."""
    name, _, kind = metric.partition(",")
    own = [s for s in samples if s.get("filter", "none") == (kind or "none")]
    values = [s.get(name) for s in sorted(own, key=lambda s: s["doc_id"])]
    found = [float(v) for v in values if isinstance(v, (int, float))]
    # Without one of its halves a pair would shift all that follow.
    return found if len(found) == len(values) else []


def _are_of(values: Sequence[float], mean: float) -> bool:
    """Whether a metric is the mean of its items, which a perplexity, say, is not."""
    return bool(values) and math.isclose(fmean(values), mean, rel_tol=1e-6, abs_tol=1e-9)


def compared(found: Mapping[str, Results]) -> dict[str, Any]:
    """Both models on each metric of each task, and their difference where items can be paired."""
    before, after = found["before"], found["after"]
    card: dict[str, Any] = {}
    for task, metrics in before.means.items():
        card[task] = {}
        for metric, mean in metrics.items():
            both = before.values[task][metric], after.values[task][metric]
            row: dict[str, Any] = {"original": mean, "distilled": after.means[task][metric]}
            means = mean, after.means[task][metric]
            if all(map(_are_of, both, means)) and len(both[0]) == len(both[1]):
                theirs, ours = (PerRequest(values, [1] * len(values)) for values in both)
                row["difference"] = paired_difference(ours, theirs).summary()
            card[task][metric] = row
    return card
