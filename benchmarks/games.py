"""Games at once: how many a second, and what share of the time is not the model's.

    python -m benchmarks.games              # 64 games of Frozen Lake on SmolLM2-135M
    python -m benchmarks.games --games 256 --save gpu

At most 5 turns of at most 16 tokens, sampled at temperature 1, environments in worker processes,
one a core. The model plays two batches, of which the second is timed.

    games_per_s     whole games
    outside_share   of the time: environments, chat template and texts; the rest is the engine's
    tokens_share    tokens that the model computed over the least possible, with pads, and with
                    those of rows that wait for a longer answer of their batch
"""

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.problems import SMOLLM2, frozen_model, has_smollm2
from benchmarks.rows import RESULTS, Row, origin, write
from opcd.episodes import Prompt
from opcd.experience.games.environments import Environments, Opening
from opcd.experience.games.playing import Game, Played, Seat, Table
from opcd.models.by_name import load_tokenizer, resolve_device, resolve_dtype
from opcd.models.lm import causal_lm, stop_at, transformer
from opcd.passes.plan import find_plan
from opcd.rollouts.choice import build_engine
from opcd.rollouts.protocol import Conversations, Rollout, RolloutEngine, SamplingParams
from opcd.tasks.chat import Chat
from opcd.tasks.messages import system, user
from opcd.tasks.template import Template

DEVICE = resolve_device("auto")
DTYPE = resolve_dtype("auto", DEVICE)
TURNS, PARAMS = 5, SamplingParams(16)


class Timed:
    """An engine's open rows, and the seconds that they took."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine
        self.seconds = 0.0

    def open(self, prompts: Sequence[Sequence[int]]) -> Conversations:
        return TimedRows(self.timed(lambda: self._engine.open(prompts)), self)

    def timed(self, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        found = call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - begin
        return found


class TimedRows:
    def __init__(self, rows: Conversations, engine: Timed) -> None:
        self._rows, self._engine = rows, engine

    @property
    def token_ids(self) -> list[list[int]]:
        return self._rows.token_ids

    def complete(
        self, params: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[Rollout | None]:
        return self._engine.timed(lambda: self._rows.complete(params, streams))

    def append(self, token_ids: Sequence[Sequence[int]]) -> None:
        self._engine.timed(lambda: self._rows.append(token_ids))

    def close(self) -> None:
        self._engine.timed(self._rows.close)


@contextlib.contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """Tokens that went into the model's layers."""
    found: list[int] = []
    layers: Any = transformer(model)
    hook = layers.layers[0].register_forward_pre_hook(
        lambda _, inputs: found.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    yield found
    hook.remove()


def seats(environments: Environments, seeds: range, chat: Chat) -> list[Seat]:
    found = []
    for seed, opening in zip(seeds, environments.openings(seeds), strict=True):
        assert isinstance(opening, Opening), opening
        game = Game((user(opening.text),), (), f"seed {seed}", seed=seed)
        ids = chat.student_ids(game.messages)
        found.append(Seat(game, Prompt(ids, ids), ids, seed, len(ids)))
    return found


def least(played: Sequence[Played]) -> int:
    """What all games begin with once, and of each what follows, but its last token."""
    rows = [[*it.seat.start_ids, *(t for piece in it.pieces for t in piece)] for it in played]
    shared = next(i for i, ids in enumerate(zip(*rows, strict=False)) if len({*ids}) > 1)
    return shared + sum(len(row) - shared - 1 for row in rows)


def measured(games: int, batch_size: int) -> Row:
    name, model = frozen_model(SMOLLM2, DEVICE, DTYPE)
    template = Template(load_tokenizer(name))
    stop_at(model, template.stop_ids)
    chat = Chat(template, [system("Play well.")])
    with Environments("frozen_lake", 5) as environments, torch.no_grad():
        table = Table(environments, TURNS)
        first = seats(environments, range(2 * games), chat)
        plan = find_plan(model, list(first[0].start_ids))
        engine = build_engine("auto", model, batch_size, plan)
        timed: Any = Timed(engine)
        config = causal_lm(model).config
        table.play(timed, config, chat, first[:games], PARAMS)
        timed.seconds = 0.0
        with counted(model) as tokens:
            begin = time.perf_counter()
            played = table.play(timed, config, chat, first[games:], PARAMS)
            seconds = time.perf_counter() - begin
    turns = sum(int(it.counts["turns"]) for it in played)
    return {
        "question": "games",
        "model": name,
        "engine": engine.name,
        "games_at_once": games,
        "rollout_batch_size": batch_size,
        "games_s": round(seconds, 2),
        "games_per_s": round(games / seconds, 3),
        "outside_share": round(1 - timed.seconds / seconds, 4),
        "tokens_share": round(sum(tokens) / least(played), 3),
        "turns_share": round(turns / (TURNS * games), 3),
        "dropped": sum(it.lost is not None for it in played),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--games", type=int, default=64, help="at once")
    parser.add_argument("--batch", type=int, default=64, help="rollout_batch_size")
    parser.add_argument("--save", metavar="NAME", help="results/games-NAME.json")
    args = parser.parse_args()
    if not has_smollm2():
        parser.exit(1, "SmolLM2's own weights and tokenizer are needed: make demo\n")
    row = origin() | measured(args.games, args.batch)
    print(json.dumps(row, indent=1))
    if args.save:
        write([row], Path(RESULTS) / f"games-{args.save}.json")


if __name__ == "__main__":
    main()
