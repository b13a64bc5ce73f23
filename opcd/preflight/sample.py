"""The requests that a prompt is looked at by, before any training."""

from opcd.tasks.task import Case, Task, spread

SAMPLE = 64  # requests


def sample(task: Task) -> list[Case]:
    """Some that can be judged, where there are such; else of all but the test data, spread over
    their files.

    The test data are left alone, unless nothing else is there: a prompt that is mended by them is
    not tested by them any more.
    """
    parts = task.validation, task.training
    judged = [case for part in parts if task.judges(part) for case in part]
    return spread(judged or [*task.validation, *task.training] or task.test, SAMPLE)


def sample_line(cases: list[Case], task: Task) -> str:
    """How many there are, for people."""
    judged = "whose answers are judged" if task.judges(cases) else "whose answers nothing judges"
    return f"sample    {len(cases)} requests, {judged}"
