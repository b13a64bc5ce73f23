"""Training conversations turn by turn: what stands in front of each assistant turn is a prompt."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from opcd.tasks.conversation import answering_turns, learned_turns
from opcd.tasks.data import Example


def prompts_in(example: Example) -> list[Example]:
    """The prompts of a conversation, in order; the example itself is the last.

    Each is all that was said in front of an assistant turn that answers something, with the
    example's own system message; of a recorded one, in front of each that is trained on. Raises
    InputError for an assistant turn behind another one.
    """
    turns_of = learned_turns if example.turn else answering_turns
    turns = turns_of(example.messages, example.source)
    inside = [replace(example, messages=example.messages[:i], turn=None) for i in turns]
    return [*inside, example]


def all_prompts(examples: Sequence[Example]) -> list[Example]:
    """The prompts of all conversations, each behind the one before it."""
    return [prompt for example in examples for prompt in prompts_in(example)]


def turns_remark(path: str, rows: Sequence[Example], prompts: int, recorded: bool) -> str:
    """How many prompts came of how many rows, and what is trained on behind them."""
    count = f"{prompts} prompt{'s' if prompts != 1 else ''}"
    what = f"{count} of {len(rows)} row{'s' if len(rows) != 1 else ''}, one for each assistant turn"
    if recorded:
        what += ", which is trained on as it was recorded"
    greetings = sum(_begins_unasked(row) for row in rows)
    history = f"; {greetings} that nothing stands in front of are history" if greetings else ""
    return f"{Path(path).name}: {what}{history}"


def _begins_unasked(example: Example) -> bool:
    own = int(example.own_system)
    return len(example.messages) > own and example.messages[own]["role"] == "assistant"
