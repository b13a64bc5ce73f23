"""What fits the model: problems that leave room for an experience, and for an answer.

That is known before the first attempt, and not found out when the first context is distilled.
"""

from transformers import PretrainedConfig

from opcd.errors import InputError
from opcd.experience.attempts import spelled
from opcd.experience.folder import Given
from opcd.experience.measuring import Bench
from opcd.models.by_name import load_config
from opcd.models.lm import max_positions
from opcd.tasks.data import Example
from opcd.tasks.limits import check_tokens
from opcd.tasks.prepare import Setup
from opcd.tasks.task import rendered

UNFIT = "that do not fit the model"


def keep_fitting(given: Given, bench: Bench) -> None:
    """Leave out what does not fit of a log, and count it. Of problems nothing is left out.

    Raises InputError for a problem that does not fit, and where nothing is left of a log. Of a
    game that is its opening, with room for a first answer: how long it grows its play decides.
    """
    exercises = given.exercises
    parts, logged = exercises.parts, exercises.logged
    setup = bench.setup(bench.requests("validation", parts.validation))
    model = load_config(setup.config.model)
    room = given.settings.experience.context_tokens
    found = {id(it): _fault(it, setup, model, room) for part in parts for it in part}
    for problem in (it for part in (parts if logged is None else parts[1:]) for it in part):
        if (fault := found[id(problem)]) is not None:
            raise fault
    faults = [fault for fault in found.values() if fault is not None]
    if logged is None or not faults:
        return
    fitting = [problem for problem in parts.train if found[id(problem)] is None]
    if not fitting:
        raise faults[0]
    known = {spelled(problem.messages) for problem in fitting}
    attempts = [attempt for attempt in logged[0] if spelled(attempt.problem) in known]
    exercises.parts = parts._replace(train=fitting)
    exercises.logged = attempts, logged[1] | {UNFIT: len(logged[0]) - len(attempts)}


def _fault(problem: Example, setup: Setup, model: PretrainedConfig, room: int) -> InputError | None:
    """Why the template, the vocabulary or the length refuses a problem."""
    limit, most = max_positions(model), setup.config.max_completion_tokens
    try:
        ids = rendered(setup.chat.student_ids, problem)
        check_tokens(ids, model.get_text_config().vocab_size, setup.tokenizer, problem)
    except InputError as error:
        return error
    total = room + len(ids) + most
    if limit is None or total <= limit:
        return None
    return InputError(
        f"{problem.source}: experience, problem and completion must fit the model's {limit} "
        f"positions, got {room} + {len(ids)} + {most} = {total} tokens; lower context_tokens or "
        f"max_completion_tokens, or leave that problem out"
    )
