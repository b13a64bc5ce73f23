"""Items: what a model writes down about its own attempts, in lines that help with other problems.

The model sees a problem and one attempt, without the right answer, and is asked for lines
``- EXPERIENCE ITEM: ...``; only those lines are kept (arXiv 2602.12275), and of them only those
that do not just repeat the request: small models give the problem or the instructions back.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from opcd.episodes import Prompt
from opcd.errors import InputError
from opcd.evaluation.contenders import LoadedModel
from opcd.experience.attempts import RIGHT, Attempt
from opcd.models.lm import max_positions
from opcd.rollouts.noise import ATTEMPTS, streams
from opcd.rollouts.protocol import SamplingParams
from opcd.scoring.reasoning import split_thought
from opcd.scoring.texts import folded
from opcd.tasks.messages import user, words_of
from opcd.tasks.records import read_text

PROMPT = Path(__file__).parent / "prompts" / "items.md"
ITEM_TOKENS = 256  # of what is written down about one attempt, or as many as an answer may have
MARK = "- EXPERIENCE ITEM:"
RIGHT_SAID, WRONG_SAID = " It was found right.", " It was found wrong."
PARTLY_SAID = " It was found right in part."
PLACES = frozenset({"{problem}", "{attempt}"})


def read_prompt(path: str, places: Collection[str]) -> str:
    """The request for items. Raises InputError for one that does not hold these places."""
    text = read_text(path, "items_prompt").strip()
    if missing := sorted(place for place in places if place not in text):
        raise InputError(
            f"{path}: a request for items must show what it is about, got none of "
            f"{', '.join(missing)}; write {' and '.join(sorted(places))} where they belong"
        )
    return text


def written_items(model: LoadedModel, requests: Sequence[str], round_number: int) -> list[str]:
    """The items that the model writes on requests, in their order; each of them once.

    A request that does not fit the model, and an answer without an item, give none.
    """
    config, chat = model.setup.config, model.setup.chat
    limit = max_positions(model.model.config)
    most = max(ITEM_TOKENS, config.max_completion_tokens)  # a thought comes first
    asked = [chat.template.ids([user(request)]) for request in requests]
    fitting = [
        (request, ids)
        for request, ids in zip(requests, asked, strict=True)
        if limit is None or len(ids) + most <= limit
    ]
    if not fitting:
        return []
    prompt_ids = [ids for _, ids in fitting]
    numbers = streams(config.seed, ATTEMPTS - round_number, [Prompt(i, i) for i in prompt_ids])
    params = SamplingParams(most, config.temperature)
    rollouts = model.engine.generate(prompt_ids, params, numbers)
    return distinct(
        [
            item
            for (request, _), rollout in zip(fitting, rollouts, strict=True)
            for item in items_in(
                split_thought(chat.decode(rollout.completion_token_ids)).answer or "",
                rollout.finish_reason == "length",
            )
            if not repeats(item, request)
        ]
    )


def request_for_items(prompt: str, attempt: Attempt, reward: bool) -> str:
    """The request, with the attempt in place."""
    return filled(
        prompt,
        {
            "{problem}": "\n\n".join(words_of(message) for message in attempt.problem),
            "{attempt}": attempt.text,
            "{outcome}": _outcome(attempt.value) if reward else "",
        },
    )


def _outcome(value: float | None) -> str:
    """By the value alone: whether an answer was cut is another question."""
    if value is None:
        return ""
    return RIGHT_SAID if value >= RIGHT else PARTLY_SAID if value > 0 else WRONG_SAID


def filled(prompt: str, texts: Mapping[str, str]) -> str:
    """A request with texts in its places: what one text holds is not searched for places."""
    return re.sub("|".join(map(re.escape, texts)), lambda place: texts[place[0]], prompt)


def items_in(text: str, cut: bool = False) -> list[str]:
    """The lines of a text that are items; without the last one of a text that was cut."""
    lines = (line.strip() for line in text.splitlines()[: -1 if cut else None])
    return [line for line in lines if line.startswith(MARK) and line.removeprefix(MARK).strip()]


def repeats(item: str, request: str) -> bool:
    """Whether a request says, word by word, what an item says."""
    return f" {_words(item.removeprefix(MARK))} " in f" {_words(request)} "


def distinct(items: Sequence[str]) -> list[str]:
    """Items, of those that say the same the last spelling, where it was said first."""
    return list({folded(item): item for item in items}.values())


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", folded(text)))
