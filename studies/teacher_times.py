"""How long a teacher takes for a step's completions, behind a shared prefix and in full.

The prompts are a step's, with completions of `max_completion_tokens` tokens each: the longest that
training can have. Both ways must agree before they are timed. Medians of interleaved rounds.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from opcd.config import TrainConfig
from opcd.config.settings import gather
from opcd.episodes import Episode
from opcd.models.lm import causal_lm
from opcd.objective import head_divergence
from opcd.passes.prefix import SharedPrefix
from opcd.tasks.prepare import prepare
from opcd.teacher import SharedPrefixTeacher

ROUNDS = 3
APART = 0.02  # nats a token, at most: rounding in bf16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="of a run")
    parser.add_argument("out", type=Path, help="JSON file for the seconds")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    found = times(gather({}, arguments.config), arguments.rounds)
    arguments.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


@torch.no_grad()
def times(config: TrainConfig, rounds: int) -> dict[str, float]:
    """Seconds: a step's passes each way, and the one pass over the context that sharing needs."""
    setup = prepare(config, for_training=True)
    model, task = setup.load(config.model), setup.task
    n = config.max_completion_tokens
    episodes = [
        Episode.of_completion(prompt, (prompt.student_ids * n)[:n], "length")
        for prompt in task.train[: config.prompts_per_step]
    ]
    shared, full = (
        SharedPrefixTeacher(model, task.prefixes, config.max_tokens_per_pass, shared=sharing)
        for sharing in (True, False)
    )
    ways: dict[str, Callable[[], object]] = {
        "shared_s": lambda: shared.score(episodes),
        "full_s": lambda: full.score(episodes),
        "prefix_s": lambda: SharedPrefix(causal_lm(model), task.a_prefix),
    }
    ours, theirs = shared.score(episodes).hidden, full.score(episodes).hidden
    apart = head_divergence(ours, shared.head, theirs, full.head).per_token.mean().item()
    assert apart < APART, f"wrong by {apart:.3g} nats a token: not timed"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    found = {name: statistics.median(each) for name, each in seconds.items()}
    return found | {"sequences": len(episodes), "prefix_tokens": len(task.a_prefix)}


if __name__ == "__main__":
    sys.exit(main())
