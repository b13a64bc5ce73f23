"""Episodes: many games advance together, a turn of all at a time, over rows that stay open.

A row holds what a player was told and said, as token ids; what a turn has computed stays for the
next one, and what all rows begin with is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from transformers import PretrainedConfig

from opcd.episodes import Episode, Prompt, Span
from opcd.evaluation.contenders import answer
from opcd.experience.games.environment import WON, Step
from opcd.experience.games.environments import Environments
from opcd.models.lm import max_positions, rope_differs
from opcd.rollouts.noise import of_turn
from opcd.rollouts.protocol import Rollout, RolloutEngine, SamplingParams
from opcd.runtime.workers import Lost
from opcd.scoring.reasoning import split_thought
from opcd.tasks.between import Between
from opcd.tasks.chat import Chat
from opcd.tasks.data import Example
from opcd.tasks.messages import Message, assistant, user

TOO_LONG = "grown longer than the model"


@dataclass(frozen=True)
class Game(Example):
    """A game as a problem: its message is how it begins."""

    seed: int = 0

    @property
    def opening(self) -> str:
        """What its player is told first."""
        return self.messages[-1]["content"]


class Seat(NamedTuple):
    """Where a game is played: what the player is given, and what its turns are drawn by."""

    game: Game
    prompt: Prompt
    start_ids: Sequence[int]  # the prompt's as this player sees it
    stream: int
    longest: int  # tokens in front of the first turn, as the model sees it that sees more


@dataclass
class Played:
    """A game that is played, as far as it has come."""

    seat: Seat
    pieces: list[list[int]] = field(default_factory=list)  # a completion, what follows it, ...
    turns: list[Message] = field(default_factory=list)  # the same as people read it
    finish: str = "stop"  # "length" where any of its completions was cut
    reward: float = 0.0
    illegal: int = 0  # turns
    lost: Lost | None = None

    @property
    def won(self) -> bool:
        """Whether its rewards add up to 1: in part right is not won."""
        return self.reward >= WON

    @property
    def counts(self) -> dict[str, float]:
        """What is told of it beside whether it was won."""
        return {"turns": (len(self.pieces) + 1) // 2, "illegal moves": self.illegal}

    @property
    def length(self) -> int:
        """Tokens so far, as the model sees them that sees more."""
        return self.seat.longest + sum(map(len, self.pieces))

    def say(self, rollout: Rollout, params: SamplingParams, chat: Chat) -> str:
        """Take the player's next completion; returns what its environment is told of it."""
        ids, finish = rollout.completion_token_ids, rollout.finish_reason
        said = answer(ids, finish, params, chat).text
        self.pieces.append(ids)
        self.turns.append(assistant(said))
        if finish != "stop":
            self.finish = finish
        return split_thought(said).answer or ""

    def hear(self, step: Step | Lost) -> bool:
        """Take what came of it; whether the game goes on."""
        if isinstance(step, Lost):
            self.lost = step
            return False
        self.reward += step.reward
        self.illegal += step.illegal
        if step.observation:
            self.turns.append(user(step.observation))
        return not step.done

    def episode(self) -> Episode:
        """All completions scored, each behind what was told and said before it."""
        prompt = self.seat.prompt
        starts = [0, *accumulate(map(len, self.pieces))]
        spans = tuple(
            Span(len(prompt.student_ids) + start, len(prompt.teacher_ids) + start, len(piece))
            for start, piece in [*zip(starts, self.pieces, strict=False)][::2]
        )
        ids = [token for piece in self.pieces for token in piece]
        student, teacher = [*prompt.student_ids, *ids], [*prompt.teacher_ids, *ids]
        return Episode(student, teacher, spans, prompt.context, self.finish)


class Table:
    """Games of one kind, and the rules that all players have in common."""

    def __init__(self, environments: Environments, max_turns: int) -> None:
        self.environments = environments
        self.max_turns = max_turns

    def play(
        self,
        engine: RolloutEngine,
        config: PretrainedConfig,  # of the engine's model
        chat: Chat,
        seats: Sequence[Seat],
        params: SamplingParams,
    ) -> list[Played]:
        """Play all games to their ends, or up to `max_turns`; the results in order.

        A game whose environment raised, hung or crashed, and one that no longer fits the model, is
        `lost`.
        """
        between = Between(chat)
        found = [Played(seat) for seat in seats]
        running = [self.environments.begin(s.game.seed, s.game.opening) for s in seats]
        rows = engine.open([seat.start_ids for seat in seats])
        try:
            for turn in range(1, self.max_turns + 1):
                said = rows.complete(params, of_turn([seat.stream for seat in seats], turn))
                going = {i: rollout for i, rollout in enumerate(said) if rollout is not None}
                actions = [found[i].say(rollout, params, chat) for i, rollout in going.items()]
                came = self.environments.step([running[i] for i in going], actions)
                more: list[list[int]] = [[] for _ in seats]
                for i, step in zip(going, came, strict=True):
                    if not found[i].hear(step) or turn == self.max_turns:
                        continue
                    ids = between.ids(running[i].shown, going[i].completion_token_ids)
                    needed = len(ids) + params.max_completion_tokens
                    if _fits(config, found[i].length, needed):
                        found[i].pieces.append(ids)
                        more[i] = ids
                    else:
                        now = f"{found[i].length} tokens and {needed} more, with room for an answer"
                        found[i].lost = Lost(TOO_LONG, now)
                if not any(more):
                    break
                rows.append(more)
        finally:
            rows.close()
        return found


def _fits(config: PretrainedConfig, held: int, more: int) -> bool:
    """Whether a row may grow: within the model's positions, which are all turned alike."""
    limit = max_positions(config)
    return (limit is None or held + more <= limit) and not rope_differs(config, held, held + more)
