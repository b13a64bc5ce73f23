"""What a model is shown to write items about: episodes, a won one beside a lost one."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from opcd.experience.attempts import RIGHT, Attempt, by_problem
from opcd.experience.items import filled
from opcd.tasks.messages import words_of

REQUEST = Path(__file__).parent.parent / "prompts" / "compared.md"
PLACE = "{episodes}"
SPEAKERS = {"user": "GAME", "assistant": "PLAYER"}
OUTCOMES = {True: ", won", False: ", not won"}


def compared(attempts: Sequence[Attempt]) -> list[list[Attempt]]:
    """Two episodes for each game that was played, as different as there are.

    A won one and one that was not; where a game was never won, its first beside a won one of
    another, and where none was won at all, beside its first other one.
    """
    games = by_problem(attempts)
    won = [next(filter(_won, game), None) for game in games]
    others = cycle([attempt for attempt in won if attempt is not None])
    found = []
    for game, best in zip(games, won, strict=True):
        rest = [attempt for attempt in game if not _won(attempt)] if best is not None else game
        first = best if best is not None else next(others, game[0])
        second = next((attempt for attempt in rest if attempt.said != first.said), None)
        found.append([first] if second is None else [first, second])
    return found


def request_to_compare(request: str, episodes: Sequence[Attempt], reward: bool) -> str:
    """A request with episodes in its place; `reward`: whether it says which of them were won."""
    texts = [
        f"EPISODE {number}{OUTCOMES[_won(episode)] if reward else ''}\n{_told(episode)}"
        for number, episode in enumerate(episodes, start=1)
    ]
    return filled(request, {PLACE: "\n\n".join(texts)})


def _told(episode: Attempt) -> str:
    return "\n".join(
        f"{SPEAKERS[turn['role']]}: {words_of(turn)}" for turn in (*episode.problem, *episode.turns)
    )


def _won(attempt: Attempt) -> bool:
    return attempt.value is not None and attempt.value >= RIGHT
