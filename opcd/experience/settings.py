"""The settings of the loop: its own group, `experience`, beside those of a training run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

from opcd.config import TrainConfig
from opcd.config.settings import converted_to, gather, read_config_file
from opcd.errors import InputError, did_you_mean
from opcd.runtime.strict_yaml import read_yaml
from opcd.runtime.user_code import located

GROUP = "experience"
PYTHON = "python:"
A_DAY = 86400.0  # seconds
# Of a training run, and here the loop's to say.
ITS_OWN = {
    "context": "the loop writes it; an instruction that stays goes into without_context",
    "teacher": "it is the model itself, as a round begins",
    "source": "a round distils what is sampled, or played; conversations go into --log",
    "guided_completions": "the prompted model makes them, a share guided_share",
    "turns": "a problem is one request",
    "test_sets": "its test problems are one set",
    "max_minutes": "its runs are compared after as many steps, and go on where they were ended",
}
# Of a training run that chooses by validation data and makes a scorecard: a round does neither.
UNUSED = {
    "validate_every": "a round is measured when it ends",
    "divergence_prompts": "a round makes no scorecard",
    "elsewhere_tasks": "a round makes no scorecard",
    "leak_tokens": "a round makes no scorecard",
}
REFUSED = ITS_OWN | UNUSED


@dataclass(kw_only=True)
class Experience:
    """The experience loop: attempts, what is learned from them, and when that is kept."""

    game: str | None = None
    """Games in place of problems, which are what their environments draw: frozen_lake, sokoban or
    python:FILE.py:class (or python:module:class)."""
    max_turns: int = 5
    """Turns of the model in a game, which is not won where it is not over by then."""
    training_games: int = 400
    """Games to learn from."""
    validation_games: int = 200
    """Games to choose by."""
    test_games: int = 200
    """Games to be looked at once."""
    rounds: int = 1
    """Rounds of attempt, extract, filter, distil and measure."""
    problems_per_round: int = 64
    """Training problems, or games, that are attempted in a round."""
    attempts_per_problem: int = 8
    """Attempts at each, sampled at the temperature of training."""
    learn_from: Literal["both", "items", "successes"] = "both"
    """What becomes experience: items that the model writes down about its attempts (of games, as it
    compares them), right attempts as demonstrations (small models write poor rules), or both, of
    which validation chooses."""
    reward: bool = True
    """Whether the model is told which attempts were right when it writes items; demonstrations need
    to know it anyway."""
    items_prompt: str | None = None
    """Text file with the request for items, in place of the one that comes with opcd; {problem},
    {attempt} and {outcome} are filled in, of games {episodes}."""
    context_tokens: int = 1024
    """Most tokens of an experience: whole items, of which the newest stay."""
    candidates: int = 4
    """Contexts of each kind that are made of a round's experience and scored on validation."""
    experiences: int = 1
    """How many of the best contexts are distilled; with several each training prompt names one,
    drawn once."""
    check_seconds: float = 5.0
    """Time limit of one call of the checker, or of a game."""
    elsewhere_loss: float = 0.03
    """A round is rolled back where the share of unrelated answers that are still the original
    model's falls by more, beyond its interval."""
    off_policy: bool = True
    """Distil the accepted contexts once more on the prompted model's own completions, for the
    column that the others are compared with; takes as long as the rounds' training."""

    @property
    def named_code(self) -> dict[str, str]:
        """The fields that name Python code."""
        return {"game": self.game} if self.game and self.game.startswith(PYTHON) else {}

    def check(self) -> "Experience":
        """Raise InputError for values out of range; returns self."""
        for name in ("rounds", "problems_per_round", "attempts_per_problem", "candidates"):
            _at_least(name, getattr(self, name), 1)
        for name in ("experiences", "context_tokens", "max_turns"):
            _at_least(name, getattr(self, name), 1)
        for name in ("training_games", "validation_games", "test_games"):
            _at_least(name, getattr(self, name), 1)
        if not 0 < self.check_seconds <= A_DAY:
            raise InputError(
                f"check_seconds must be positive and at most {A_DAY:.0f}, a day, got "
                f"{self.check_seconds}"
            )
        if not 0 <= self.elsewhere_loss <= 1:
            raise InputError(
                f"elsewhere_loss must lie between 0 and 1, got {self.elsewhere_loss}; 0.03 is "
                f"three points"
            )
        return self


class Settings(NamedTuple):
    """All that the loop is given."""

    training: TrainConfig  # its context is a stand-in
    experience: Experience
    log: str | None = None  # conversations that take the place of attempts

    @property
    def kind(self) -> str:
        """What the exercises are called."""
        return "games" if self.experience.game else "problems"


KINDS = get_type_hints(Experience)
STAND_IN = "no experience yet"
OF_GAMES = ("max_turns", "training_games", "validation_games", "test_games")
OF_PROBLEMS = ("prompts", "validation_data", "test_data", "held_out_share", "scorer")


def read_settings(
    given: Mapping[str, Any],  # by the command line: fields of both
    file: Path | None,
    preset: str | None = None,
    log: str | None = None,
) -> Settings:
    """The settings of a file, overridden by the command line. Raises InputError for wrong ones."""
    own: dict[str, Any] = {}
    written: dict[str, Any] = {}
    if file is not None:
        content = read_yaml(file, "a configuration")
        group = (content.get(GROUP) if isinstance(content, dict) else None) or {}
        if not isinstance(group, dict):
            raise InputError(f"{file}: the group {GROUP} must hold fields, got {group!r:.80}")
        own = _converted(group, str(file), file.parent)
        written = read_config_file(file, GROUP)[1]
    own |= _converted({k: v for k, v in given.items() if k in KINDS}, "command line", Path())
    others = {k: v for k, v in given.items() if k not in KINDS}
    for name, why in REFUSED.items():
        if name in written or name in others:
            raise InputError(f"{name} must not be set in the experience loop: {why}; leave it out")
    training = gather(others | {"context": STAND_IN}, file, preset, leave_out=GROUP)
    experience = Experience(**own).check()
    if experience.game is not None:
        named = [name for name in OF_PROBLEMS if name in written or name in others]
        if named or log is not None:
            raise InputError(
                f"{', '.join(named) or 'a log'} must not be given with a game, which draws its own "
                f"and says itself what is won; leave that out, or the game"
            )
    elif named := [name for name in OF_GAMES if name in own]:
        raise InputError(
            f"{', '.join(named)} must come with a game, got none; name one, like frozen_lake, or "
            f"leave that out"
        )
    if log is not None and experience.rounds > 1:
        raise InputError(
            f"a log must be learned from in one round, got rounds {experience.rounds}: its "
            f"attempts are those of one model; set rounds to 1, and give the next model's log to a "
            f"loop of its own"
        )
    return Settings(training, experience, str(Path(log).expanduser().absolute()) if log else None)


def _converted(group: Mapping[str, Any], source: str, folder: Path) -> dict[str, Any]:
    """Values in the kinds of their fields, with files as they are found from `folder`."""
    for name in group:
        if name not in KINDS:
            raise InputError(f"{source}: there is no field {name!r}{did_you_mean(name, KINDS)}")
    found = {name: converted_to(KINDS[name], name, value, source) for name, value in group.items()}
    if found.get("items_prompt"):
        found["items_prompt"] = str((folder / Path(found["items_prompt"]).expanduser()).absolute())
    if (found.get("game") or "").startswith(PYTHON):
        found["game"] = PYTHON + located(found["game"].removeprefix(PYTHON), folder)
    return found


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings by name, for a file, without those that may change as a loop goes on."""
    training = dataclasses.asdict(settings.training)
    left_out = ("origins", "output_dir", "context", "today", *UNUSED)
    return {
        **{name: value for name, value in training.items() if name not in left_out},
        **{k: v for k, v in dataclasses.asdict(settings.experience).items() if k != "rounds"},
        "log": settings.log,
    }


def _at_least(name: str, value: int, bound: int) -> None:
    if value < bound:
        raise InputError(f"{name} must be at least {bound}, got {value}")
