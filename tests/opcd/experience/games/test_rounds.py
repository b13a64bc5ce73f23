"""The whole loop on games and a tiny model, killed and resumed, and the split of the games."""

import json
from pathlib import Path

import pytest
import torch

from opcd.cli import main
from opcd.errors import InputError
from opcd.experience.games.environments import Environments
from opcd.experience.games.exercises import Games, drawn
from opcd.experience.games.grid import symmetries
from opcd.experience.games.playing import Game
from opcd.experience.settings import REFUSED, Experience, read_settings
from opcd.runtime.files import read_metrics
from opcd.runtime.workers import RAISED
from tests.opcd.experience.games.players import last_board
from tests.opcd.experience.loops import assert_same, killed_again_and_again, run, weights

GAME = """
class Parity:
    # Two turns, of which a random model is right in the second in about half.
    def reset(self, seed):
        self.seed, self.turn, self.right = seed, 0, 0
        return f"Game number {seed}. Say a word."

    def step(self, action):
        if action.startswith("!"):
            raise RuntimeError("exclamation")
        self.turn += 1
        good = self.turn == 1 or sum(map(ord, action)) % 2 == self.seed % 2
        reward = 0.5 if good else 0
        illegal = not action.isascii()
        return ("" if self.turn == 2 else f"That was {good}. Another one."), reward, \\
            self.turn == 2, illegal
"""


@pytest.fixture
def task(settings: dict, tmp_path: Path, brief_model: Path) -> dict:
    """A game and the fields of a short loop."""
    (tmp_path / "parity.py").write_text(GAME)
    own = {
        "game": f"python:{tmp_path / 'parity.py'}:Parity",
        "max_turns": 3,
        "training_games": 16,
        "validation_games": 8,
        "test_games": 6,
        "model": str(brief_model),
        "steps": 2,
        "prompts_per_step": 4,
        "guided_share": 0.5,
        "learning_rate": 3e-4,
        "max_completion_tokens": 6,
        "problems_per_round": 8,
        "attempts_per_problem": 6,
        "learn_from": "successes",
        "context_tokens": 240,
        "candidates": 1,
        "off_policy": False,
        "eval_temperature": 1.0,
        "without_context": "Play.",
    }
    left_out = {"prompts", "validation_data", "test_data", *REFUSED}
    return {k: v for k, v in settings.items() if k not in left_out} | own


def test_no_board_of_a_part_stands_in_another_turned_or_mirrored() -> None:
    for spec, sizes in (("frozen_lake", (500, 200, 200)), ("sokoban", (60, 25, 25))):
        names = ("training_games", "validation_games", "test_games")
        wanted = Experience(**dict(zip(names, sizes, strict=True)))
        with Environments(spec, 5, 1) as environments:
            parts, again = (drawn(environments, spec, wanted) for _ in range(2))
        assert parts == again
        assert [*map(len, parts)] == [*sizes]
        forms = [forms_of(part) for part in parts]
        assert not forms[0] & forms[1]
        assert not (forms[0] | forms[1]) & forms[2]
        texts = [game.opening for part in parts for game in part]
        assert len({*texts}) == sum(sizes)


def forms_of(part: list) -> set[tuple[str, ...]]:
    """All boards of a part in all eight forms, the player's place told apart no more."""
    found = set()
    for game in part:
        assert isinstance(game, Game)
        rows = ["".join(row) for row in last_board(game.opening)]
        if "G" in game.opening.split("\n\n")[1]:  # start and goal: whichever is which
            rows = [row.replace("P", "E").replace("G", "E") for row in rows]
        rows = [row.replace("P", ".").replace("+", "T") for row in rows]
        found |= {tuple(form) for form in symmetries(rows)}
    return found


@pytest.mark.usefixtures("kept_whatever")
def test_a_round_of_games(task: dict) -> None:
    full = task | {"off_policy": True, "elsewhere_prompts": 3, "learn_from": "both"}
    found = run(full)
    folder = found.folder
    (row,) = found.rounds
    assert row["accepted"]
    assert {"base", "distilled", "off_policy"} <= set(found.columns)
    counts = row["attempts"]
    assert counts["attempts"] == 48
    assert counts["right"] > 0
    assert counts["dropped"].get(RAISED, 0) + counts["judged"] == 48
    assert 1 <= counts["counts"]["turns"] <= 2
    assert "illegal moves" in row["without"]["counts"]

    # Won games, as turns; their games are not trained on.
    (file,) = row["winners"]
    messages = json.loads((folder / "round-1" / "candidates" / file).read_text())
    assert messages[0] == {"role": "system", "content": "Play."}
    assert [m["role"] for m in messages[1:5]] == ["user", "assistant"] * 2
    assert messages[3]["content"] == "That was True. Another one."
    shown = {m["content"] for m in messages if m["content"].startswith("Game number")}
    trained = (folder / "round-1" / "prompts.jsonl").read_text()
    assert shown
    assert not any(json.dumps(text) in trained for text in shown)

    run_folder = folder / "round-1" / "run"
    metrics = read_metrics(run_folder / "metrics.jsonl")
    for step in metrics:
        assert step["games_dropped"] + step["guided_games_dropped"] >= 0
        assert 0 <= step["guided_games_won"] <= 1
        assert step.get("turns", 2) > 1
    only = read_metrics(folder / "round-1" / "off_policy" / "metrics.jsonl")
    assert all("games_won" not in step and "guided_games_won" in step for step in only)
    report = (folder / "report.md").read_text()
    assert "| turns | illegal moves |" in report
    # The run's folder says what it was trained on; without its games nothing goes on.
    assert "source: played" in (run_folder / "config.yaml").read_text()
    with pytest.raises(InputError, match="must keep its settings, got other values for max_turns"):
        run(full, resume=True, max_turns=4)


@pytest.mark.usefixtures("kept_whatever")
def test_games_killed_in_each_phase_resume_to_the_same_result(
    task: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(task | {"output_dir": str(tmp_path / "whole")})
    found, deaths = killed_again_and_again(task, monkeypatch)
    assert deaths > 7
    assert_same(found, whole)
    assert weights_moved(task, weights(whole.folder))


def weights_moved(task: dict, trained: dict[str, torch.Tensor]) -> bool:
    from safetensors.torch import load_file

    before = load_file(Path(task["model"]) / "model.safetensors")
    return any(not torch.equal(before[name], trained[name]) for name in trained)


def test_games_that_are_all_lost_end_with_what_they_raised(task: dict, tmp_path: Path) -> None:
    (tmp_path / "parity.py").write_text(GAME.replace('startswith("!")', 'startswith("")'))
    with pytest.raises(InputError, match=r"must be judged, but of 8 none was.*exclamation"):
        run(task, attempts_per_problem=1)


def test_what_does_not_go_with_a_game(
    task: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, value in (("prompts", "p.jsonl"), ("held_out_share", "0.2"), ("scorer", "number")):
        with pytest.raises(InputError, match=f"{name} must not be given with a game"):
            read_settings(task | {name: value}, None)
    with pytest.raises(InputError, match="a log must not be given with a game"):
        read_settings(task, None, log="served.jsonl")
    with pytest.raises(InputError, match="max_turns must be at least 1"):
        read_settings(task | {"max_turns": 0}, None)
    with pytest.raises(InputError, match="at most 86400, a day, got 10000000000"):
        read_settings(task | {"check_seconds": 1e10}, None)
    with pytest.raises(InputError, match=r"max_turns, training_games, .* must come with a game"):
        read_settings({name: it for name, it in task.items() if name != "game"}, None)
    (tmp_path / "near.yaml").write_text(f"""
models: {{model: {task["model"]}}}
run: {{output_dir: x}}
experience: {{game: "python:own/parity.py:Parity"}}
""")
    found = read_settings({}, tmp_path / "near.yaml")
    assert found.experience.game == f"python:{tmp_path / 'own' / 'parity.py'}:Parity"
    # Games are the loop's to bring.
    (tmp_path / "c.md").write_text("Play well.")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    fields = {"context": tmp_path / "c.md", "prompts": tmp_path / "p.jsonl", "device": "cpu"}
    fields |= {"model": task["model"], "output_dir": tmp_path / "alone", "source": "played"}
    given = [text for name, value in fields.items() for text in (f"--{name}", str(value))]
    assert main(["train", *given]) == 2
    assert "source played must come with games" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", ["examples/frozen_lake/config.yaml", "recipes/paper/frozen_lake.yaml"]
)
def test_files_that_come_with_opcd(file: str) -> None:
    settings = read_settings({}, Path(__file__).parents[4] / file)
    settings.training.check()
    assert settings.experience.game == "frozen_lake"
    assert settings.experience.max_turns <= 5
    assert settings.experience.validation_games == 200


def test_the_settings_in_the_docs(tmp_path: Path) -> None:
    """Complete as they stand there."""
    docs = (Path(__file__).parents[4] / "docs" / "games.md").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(docs.split("```yaml\n")[1].split("```")[0])
    settings = read_settings({}, tmp_path / "config.yaml")
    settings.training.check()
    assert settings.experience.game == "frozen_lake"


def test_games_know_their_seeds(task: dict) -> None:
    with Games(read_settings(task, None)) as games:
        assert all(isinstance(game, Game) for part in games.parts for game in part)
        assert [game.opening for game in games.parts.test] == [
            f"Game number {game.seed}. Say a word." for game in games.parts.test
        ]
