"""The prompted teacher's completions that rivals learn from: made once, for all of them.

They are counted as they are made, so that a rival gets as many tokens as the run it is held against
trained on, whatever the lengths of completions and the turns of conversations are.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from opcd.evaluation.decoding import rollout_params
from opcd.rollouts.choice import build_engine
from opcd.runtime.files import make_folder
from opcd.runtime.memory import release_memory
from opcd.tasks.prepare import Setup
from opcd.teacher import teacher_of
from opcd.training.guided import FILE, TeacherCompletions
from opcd.training.sources import PartlyGuided


class Stored(NamedTuple):
    """What was made, in a file that a run with `guided_share` 1 takes for its own guided.jsonl."""

    steps: int  # of such a run, that come closest to the wanted number of tokens, at least one
    seconds: float  # that it took: a rival's training cannot begin without it


def store_completions(setup: Setup, tokens: float, folder: Path) -> Stored:
    """Complete training prompts, as steps take them, until there are so many tokens.

    What is there of a call that was stopped is made anew: all of it is timed.
    """
    whole = replace(setup.config, guided_share=1.0, replay_share=0.0)
    a_step = whole.prompts_per_step * whole.completions_per_prompt
    config = replace(whole, steps=max(1, math.ceil(tokens / a_step)))  # with one token each
    model = setup.load(config.model)
    teacher = teacher_of(model, setup.task.prefixes, config)
    engine = build_engine(
        config.rollout_engine,
        model,
        config.rollout_batch_size,
        teacher.plan,
        config.max_tokens_per_pass,
    )
    params = rollout_params(setup)
    (make_folder(folder) / FILE).unlink(missing_ok=True)
    completions = TeacherCompletions(teacher, engine, setup.task, config, params, folder)
    source = PartlyGuided(setup.task.conversations, config, params, completions)
    counts: list[int] = []
    begin = time.perf_counter()
    while sum(counts) < tokens and len(counts) < config.steps:
        episodes = source.episodes(len(counts), engine)
        counts.append(sum(episode.scored_tokens for episode in episodes))
    seconds = time.perf_counter() - begin
    engine.close()
    del model, teacher, engine, completions, source
    release_memory()
    less = sum(counts[:-1])
    closer = len(counts) > 1 and tokens - less < sum(counts) - tokens
    return Stored(len(counts) - closer, seconds)
