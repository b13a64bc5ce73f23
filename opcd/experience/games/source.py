"""What a step trains on: games that the student plays, and the prompted teacher for a share."""

from collections.abc import Sequence
from statistics import fmean

import torch

from opcd.episodes import Episode, Prompt
from opcd.errors import InputError
from opcd.evaluation.decoding import rollout_params
from opcd.experience.attempts import means
from opcd.experience.games.playing import Game, Played, Seat, Table
from opcd.models.lm import causal_lm
from opcd.rollouts.noise import streams
from opcd.rollouts.protocol import RolloutEngine
from opcd.tasks.between import Between
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Task
from opcd.teacher import SharedPrefixTeacher
from opcd.training.guided import teacher_engine
from opcd.training.sources import Source, parted, scored_as


class PlayedGames(Source):
    """All turns of all games of a step are scored, each game as one sequence.

    The teacher's games are played anew in each step. What a game draws is a function of seed, step,
    game and turn. A game that is lost to its environment, or no longer fits the model, is left out
    and counted.
    """

    def __init__(
        self,
        games: Sequence[Game],  # of the rows of the setup, in their order
        table: Table,
        setup: Setup,
        teacher: SharedPrefixTeacher,
    ) -> None:
        self._table, self._setup, self._teacher = table, setup, teacher
        for chat in setup.chats.values():
            Between(chat)  # refuses templates that games cannot be played with
        self._rows = [*zip(setup.task.train, games, strict=True)]
        self._params = rollout_params(setup)
        self._figures: dict[str, float] = {}
        self._guide = teacher_engine(teacher, setup.config) if setup.config.guided_share else None

    def episodes(self, step: int, sampler: RolloutEngine) -> list[Episode]:
        """See Source.episodes. The teacher's come last."""
        own, guided = parted(self._rows, step, self._setup.config)
        played = {"student": self._played(own, step, sampler, False)}
        if guided:
            assert self._guide is not None
            device = causal_lm(self._teacher.model).device
            with self._teacher.frozen(), torch.autocast(device.type, enabled=False):
                played["guided"] = self._played(guided, step, self._guide, True)
            self._guide.close()
        self._figures = {}
        for origin, games in played.items():
            self._figures |= figures("" if origin == "student" else f"{origin}_", games)
        whole = [(o, it) for o, games in played.items() for it in games if it.lost is None]
        if not whole:
            first = next(it.lost for games in played.values() for it in games if it.lost)
            raise InputError(
                f"games must be played to be trained on, but all of step {step + 1} were lost; the "
                f"first: {first}; correct the game, or raise check_seconds"
            )
        return [scored_as(it.episode(), origin, self._setup.config) for origin, it in whole]

    def figures(self) -> dict[str, float]:
        """See Source.figures."""
        return self._figures

    def _played(
        self, rows: Sequence[tuple[Prompt, Game]], step: int, engine: RolloutEngine, prompted: bool
    ) -> list[Played]:
        if not rows:
            return []
        config, prompts = self._setup.config, [prompt for prompt, _ in rows]
        n = config.completions_per_prompt
        seats = seats_of(
            self._setup.task,
            prompts,
            [game for _, game in rows],
            streams(config.seed, step, prompts, n),
            n,
            prompted,
        )
        of_model = causal_lm(self._teacher.model).config
        return self._table.play(engine, of_model, self._setup.chat, seats, self._params)


def figures(prefix: str, games: Sequence[Played]) -> dict[str, float]:
    """How games of a step went, by names that begin with `prefix`."""
    whole = [game for game in games if game.lost is None]
    found: dict[str, float] = {f"{prefix}games_dropped": len(games) - len(whole)} if games else {}
    if whole:
        found[f"{prefix}games_won"] = fmean(game.won for game in whole)
        for name, value in means([game.counts for game in whole]).items():
            found[f"{prefix}{name.replace(' ', '_')}"] = value
    return found


def seats_of(
    task: Task,
    prompts: Sequence[Prompt],
    games: Sequence[Game],
    numbers: Sequence[int],  # n for each
    n: int,
    prompted: bool,  # whether the player has the context in view
) -> list[Seat]:
    """Where n games of each are played, those of one together."""
    seats = []
    for i, number in enumerate(numbers):
        prompt, game = prompts[i // n], games[i // n]
        behind = task.prompted_ids(prompt)
        start = behind if prompted else prompt.student_ids
        seats.append(Seat(game, prompt, start, number, max(len(behind), len(prompt.student_ids))))
    return seats
