"""Episodes: who wins is known, what is scored are the moves, and no token is computed twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from pathlib import Path

import pytest
import torch

from opcd.episodes import Episode
from opcd.errors import InputError
from opcd.experience.games.environment import Step
from opcd.experience.games.environments import Environments
from opcd.experience.games.playing import TOO_LONG, Played, Table
from opcd.experience.games.source import figures
from opcd.passes.plan import find_plan
from opcd.rollouts.generate import TransformersEngine
from opcd.rollouts.protocol import SamplingParams
from opcd.runtime.workers import CRASHED
from opcd.student_loss import StudentLoss
from opcd.tasks.between import Between
from opcd.teacher import SharedPrefixTeacher
from tests.conftest import CHATML, tiny_llama
from tests.opcd.experience.games import players
from tests.opcd.experience.games.players import END, PARAMS, TOKENIZER, Player, chat_of, drawing

CONFIG = tiny_llama(max_position_embeddings=4096).config
FIRST_TURNS_OPEN = CHATML.replace(
    "+ '<|im_end|>\n'", "+ ('<|im_end|>\n' if loop.last or message['role'] == 'user' else '\n')"
)
SHOUTED = "(message['content'] if loop.length < 3 else message['content'] | replace('P', 'Q'))"
REPLIES: dict[tuple[str, ...], float] = {
    ("right", "down"): 0.2,
    ("down", "right"): 0.2,
    ("right", "right"): 0.2,
    ("down", "down"): 0.2,
    ("left", "up"): 0.1,
    (): 0.1,
}


def played(spec: str, player: Player, seeds: range, turns: int = 5, **more: bool) -> list[Played]:
    chat = chat_of()
    with Environments(spec, 5, 1) as environments:
        seats = players.seats(environments, seeds, chat, **more)
        return Table(environments, turns).play(player, CONFIG, chat, seats, PARAMS)


@pytest.mark.parametrize("spec", ["frozen_lake", "sokoban"])
def test_an_oracle_wins_every_game(spec: str) -> None:
    found = played(spec, Player(players.oracle), range(60), prompted=spec == "sokoban")
    assert all(it.won and it.illegal == 0 and it.lost is None for it in found)
    told = figures("", found)
    assert told["games_won"] == 1
    assert 3 <= told["turns"] <= 5
    # Six moves take three turns of two: in two turns nobody is through.
    assert not any(it.won for it in played("frozen_lake", Player(players.oracle), range(5), 2))


def test_a_random_player_wins_as_often_as_it_must() -> None:
    seeds = range(400)
    player = Player(drawing(REPLIES))
    found = played("frozen_lake", player, seeds)
    with Environments("frozen_lake", 5, 1) as environments:
        boards = [
            players.last_board(seat.game.opening)
            for seat in players.seats(environments, seeds, chat_of())
        ]
    chances = [players.expected(board, REPLIES, 5) for board in boards]
    mean = sum(won for won, _ in chances)
    spread = sqrt(sum(won * (1 - won) for won, _ in chances))
    assert 20 < mean < 60
    assert abs(sum(it.won for it in found) - mean) < 3 * spread
    illegal = sum(it.illegal for it in found)
    assert illegal == pytest.approx(sum(turns for _, turns in chances), rel=0.1)


def test_a_game_is_won_by_rewards_that_add_up() -> None:
    """But for rounding: ten tenths are less than one."""
    (it,) = played("frozen_lake", Player(lambda *_: "left"), range(1), 1)
    for tenths in range(1, 11):
        assert it.hear(Step("On.", 0.1, False))
        assert it.won == (tenths == 10)
    assert it.reward < 1


def test_the_moves_are_scored_and_nothing_else() -> None:
    (it,) = played("frozen_lake", Player(players.oracle), range(1))
    episode = it.episode()
    said = [turn["content"] for turn in it.turns if turn["role"] == "assistant"]
    ids, prompt = list(episode.student_ids), it.seat.prompt
    spans = [ids[start : start + length] for start, length in episode.student_spans]
    assert spans == [[*TOKENIZER.encode(text), END] for text in said]
    assert len(said) == 3
    assert ids[: len(prompt.student_ids)] == prompt.student_ids
    front = len(prompt.teacher_ids)
    assert list(episode.teacher_ids)[front:] == ids[len(prompt.student_ids) :]
    # As the chat template writes the whole conversation, which ends with the last answer.
    messages = [*it.seat.game.messages, *it.turns[:-1]]
    whole = chat_of().template.text(messages, answered=True).removesuffix("\n")
    assert TOKENIZER.decode(ids) == whole


def test_an_answer_that_was_cut_is_ended() -> None:
    class Cut(Player):
        def open(self, prompts: list) -> "object":
            rows = super().open(prompts)
            real = rows.complete

            def cut(params: SamplingParams, streams: list) -> list:
                found = [r and replaced(r) for r in real(params, streams)]
                rows.token_ids[:] = [ids[:-1] if ids[-1] == END else ids for ids in rows.token_ids]
                return found

            rows.complete = cut
            return rows

    def replaced(r):
        return type(r)(r.prompt_token_ids, r.completion_token_ids[:-1], "length", 0)

    (it,) = played("frozen_lake", Cut(players.oracle), range(1))
    assert it.won
    assert it.finish == "length"
    text = TOKENIZER.decode(it.pieces[1])
    assert text.startswith("<|im_end|>\n<|im_start|>user\n")


def test_a_game_that_outgrows_the_model_is_left_out_and_counted() -> None:
    chat, config = chat_of(), tiny_llama(max_position_embeddings=700).config
    with Environments("frozen_lake", 5, 1) as environments:
        seats = players.seats(environments, range(4), chat)
        longest = max(seat.longest for seat in seats)
        assert longest + 40 < 700
        found = Table(environments, 5).play(Player(lambda *_: "left"), config, chat, seats, PARAMS)
    assert [it.lost.why for it in found if it.lost] == [TOO_LONG] * 4
    assert all("tokens and" in it.lost.detail for it in found if it.lost)
    assert figures("", found) == {"games_dropped": 4}


def test_a_template_that_games_cannot_be_played_with() -> None:
    plain = chat_of(template=CHATML.replace("<|im_end|>", ""))
    with pytest.raises(InputError, match="ends the model's turns with a special token"):
        Between(plain)
    last_alone = chat_of(template=FIRST_TURNS_OPEN)
    with pytest.raises(InputError, match="must end every turn of the model"):
        Between(last_alone)
    shouted = Between(chat_of(template=CHATML.replace("message['content']", SHOUTED)))
    with pytest.raises(InputError, match="must keep what the user says"):
        shouted.ids("P . H", [1])


GAME = """
class Until:
    # Over after one to five turns.
    def reset(self, seed):
        self.seed, self.turn = seed, 0
        return f"This is what every game begins with. Now it is game {seed:04d}"

    def step(self, action):
        import os
        self.turn += 1
        if self.seed == 3 and self.turn == 2:
            os._exit(1)
        return "Thirty letters, more or less..", 0, self.turn > self.seed % 5
"""


@contextmanager
def counted(*models: torch.nn.Module) -> Iterator[list[int]]:
    """Tokens, pads among them, that went into the models' layers."""
    found: list[int] = []
    hooks = [
        model.model.layers[0].register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0].shape[0] * inputs[0].shape[1])
        )
        for model in models
    ]
    yield found
    for hook in hooks:
        hook.remove()


def test_no_prefix_and_no_turn_is_computed_twice(tmp_path: Path) -> None:
    """Games that end at different turns, one of which its environment loses: rollouts, teacher and
    update compute each token once, at most 1.05 of the least possible."""
    (tmp_path / "until.py").write_text(GAME)
    model = tiny_llama(eos_token_id=257, max_position_embeddings=1024)
    with torch.no_grad():
        model.lm_head.weight[257] = 0  # no turn ends early: nobody waits for others in it
    model.generation_config.eos_token_id = 257
    engine = TransformersEngine(model, 32)
    chat = chat_of("An experience. " * 12)
    params = SamplingParams(8)
    with Environments(f"python:{tmp_path / 'until.py'}:Until", 5, 1) as environments:
        seats = players.seats(environments, range(20), chat)
        with counted(model) as found:
            games = Table(environments, 5).play(engine, model.config, chat, seats, params)
    assert [it.lost.why for it in games if it.lost] == [CRASHED]
    rows = [
        [*it.seat.start_ids, *(token for piece in it.pieces for token in piece)] for it in games
    ]
    shared = next(i for i, ids in enumerate(zip(*rows, strict=False)) if len({*ids}) > 1)
    least = shared + sum(len(ids) - shared - 1 for ids in rows)
    assert shared > 50
    assert least <= sum(found) <= 1.05 * least

    episodes = [it.episode() for it in games if it.lost is None]
    assert len({len(e.spans) for e in episodes}) == 5
    prompts = [seat.prompt.teacher_ids for seat in seats]
    prefix = next(i for i, ids in enumerate(zip(*prompts, strict=False)) if len({*ids}) > 1)
    behind = [
        Episode(
            e.student_ids,
            e.teacher_ids[prefix:],
            tuple(s._replace(teacher_start=s.teacher_start - prefix) for s in e.spans),
        )
        for e in episodes
    ]
    frozen = tiny_llama(1, max_position_embeddings=1024)
    teacher = SharedPrefixTeacher(frozen, prompts[0][:prefix])
    plan = find_plan(model, prompts[0][:prefix])
    with counted(frozen) as found:
        targets = teacher.score(behind)
    least = sum(len(e.teacher_ids) for e in behind)
    assert least - len(behind) <= sum(found) <= 1.05 * least
    with counted(model) as found:
        StudentLoss(model, plan)(behind, targets).loss.backward()
    least = shared + sum(len(e.student_ids) - shared for e in behind)
    assert sum(found) <= 1.05 * least
