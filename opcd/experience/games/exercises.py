"""Games as what the loop learns from; see `experience.exercises`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from opcd.errors import InputError
from opcd.evaluation.contenders import LoadedModel
from opcd.experience.attempts import Attempt
from opcd.experience.exercises import Ask, Tried
from opcd.experience.games.comparing import PLACE, REQUEST, compared, request_to_compare
from opcd.experience.games.environments import Environments
from opcd.experience.games.playing import TOO_LONG, Game, Played, Table
from opcd.experience.games.source import PlayedGames, seats_of
from opcd.experience.problems import place_of
from opcd.experience.settings import Experience, Settings
from opcd.rollouts.noise import streams
from opcd.runtime.workers import Lost
from opcd.tasks.data import Example, request_of
from opcd.tasks.held_out import Parts
from opcd.tasks.messages import user
from opcd.tasks.task import Case
from opcd.training.sources import MakeSource

MOST_SEEDS = 50  # that are drawn for one game that is wanted
FIRST_SEEDS, SEEDS_AT_ONCE = 8, 256


class Games:
    """Games that environments draw, each known by its seed."""

    logged: tuple[list[Attempt], dict[str, int]] | None = None
    request, places = REQUEST, frozenset({PLACE})

    def __init__(self, settings: Settings) -> None:
        experience = settings.experience
        assert experience.game is not None, "no game"
        self._experience, self._spec = experience, experience.game
        self._environments = Environments(self._spec, experience.check_seconds)
        self._table = Table(self._environments, experience.max_turns)
        self.changes: dict[str, Any] = {"source": "played"}
        self.parts = Parts([], [], [])

    def __enter__(self) -> "Games":
        self._environments.__enter__()
        try:
            self.parts = drawn(self._environments, self._spec, self._experience)
        except BaseException:
            self._environments.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._environments.close()

    def tried(
        self, model: LoadedModel, cases: Sequence[Case], exercises: Sequence[Example], ask: Ask
    ) -> list[Tried]:
        """See Exercises.tried. As many games at once as `rollout_batch_size`."""
        if not model.plan.shares_prefix and self._table.max_turns > 1:
            raise InputError(
                f"games must have a model that goes on behind what it has read, got "
                f"{type(model.model).__name__}: {model.plan.reason}; choose another"
            )
        config, prompts = model.setup.config, [case.prompt for case in cases]
        numbers = streams(config.seed, ask.step, prompts, ask.times)
        games = _games(exercises)
        seats = seats_of(model.setup.task, prompts, games, numbers, ask.times, ask.prompted)
        size, found = config.rollout_batch_size, list[Played]()
        for start in range(0, len(seats), size):
            some = seats[start : start + size]
            found += self._table.play(
                model.engine, model.model.config, model.setup.chat, some, ask.params
            )
        return [Tried(it.turns, _value(it), it.finish, it.counts) for it in found]

    def item_requests(self, attempts: Sequence[Attempt], request: str, reward: bool) -> list[str]:
        """See Exercises.item_requests. Two episodes of each game, or of it and another."""
        return [request_to_compare(request, episodes, reward) for episodes in compared(attempts)]

    def source(self, exercises: Sequence[Example]) -> MakeSource | None:
        """See Exercises.source: games that are played."""
        return partial(PlayedGames, _games(exercises), self._table)


def drawn(environments: Environments, spec: str, wanted: Experience) -> Parts:
    """As many different games as are wanted, of the seeds 0, 1, 2, ... in their order.

    The part of a game is a function of its key alone, so that games which are one in different
    dress are in one part. One that cannot be begun is left out. Raises InputError where none can
    be, and where there are too few.
    """
    counts = [wanted.training_games, wanted.validation_games, wanted.test_games]
    parts: tuple[list[Example], ...] = ([], [], [])
    known: set[tuple[str, str]] = set()
    seed, size = 0, FIRST_SEEDS
    while any(len(part) < count for part, count in zip(parts, counts, strict=True)):
        if seed >= MOST_SEEDS * sum(counts):
            raise InputError(_too_few(spec, parts, counts, seed))
        lost: list[Lost] = []
        for number, opening in enumerate(
            environments.openings(range(seed, seed + size)), start=seed
        ):
            if isinstance(opening, Lost):
                lost.append(opening)
                continue
            source = f"{spec} with seed {number}"
            game = Game((user(opening.text),), (), source, seed=number)
            part = _part(opening.key, counts)
            if request_of(game) not in known and len(parts[part]) < counts[part]:
                parts[part].append(game)
            known.add(request_of(game))
        if len(lost) == size:
            raise InputError(
                f"game {spec} must begin, but with {size} seeds it did not; the first: {lost[0]}; "
                f"correct it, or raise check_seconds"
            )
        seed, size = seed + size, min(2 * size, SEEDS_AT_ONCE)
    return Parts(*parts)


def _part(key: str, counts: Sequence[int]) -> int:
    """Each part is given a share of all keys that is as large as its share of the games."""
    place = place_of(key) * sum(counts)
    return 0 if place < counts[0] else 1 if place < counts[0] + counts[1] else 2


def _too_few(spec: str, parts: Sequence[Sequence[Example]], counts: Sequence[int], n: int) -> str:
    found = " and ".join(f"{len(p)} of {count}" for p, count in zip(parts, counts, strict=True))
    return (
        f"game {spec} must have as many different games as are wanted, got {found} to learn from, "
        f"to choose by and to be looked at once, of {n} seeds; lower training_games, "
        f"validation_games or test_games"
    )


def _games(exercises: Sequence[Example]) -> list[Game]:
    games = [it for it in exercises if isinstance(it, Game)]
    assert len(games) == len(exercises), "exercises that are no games"
    return games


def _value(played: Played) -> float | Lost:
    """A game that outgrew the model was not won: it was the player's to end it."""
    if played.lost is not None and played.lost.why != TOO_LONG:
        return played.lost
    return float(played.won)
