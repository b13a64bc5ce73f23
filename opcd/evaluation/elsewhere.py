"""What a distilled model became where its context has no say.

Test data show it on the requests that the context is for. Here original and distilled model get
requests of every other kind, both without the context: how many greedy answers are still the same,
and how far apart the two are on the original's answers, token by token.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opcd.episodes import Episode, Prompt
from opcd.evaluation.agreement import KL, Side, kl_both_ways, student_side
from opcd.evaluation.contenders import LoadedModel
from opcd.evaluation.intervals import PerRequest
from opcd.rollouts.protocol import SamplingParams
from opcd.tasks.elsewhere import ANSWER_TOKENS
from opcd.tasks.prepare import Setup

SHARES = {"agreement", "common_prefix"}


class Elsewhere(NamedTuple):
    """The figures, and both answers to every request."""

    card: dict[str, Any]
    answers: list[dict[str, Any]]


def original_side(model: LoadedModel) -> Side:
    """What the model before training answers elsewhere, and what it makes of that."""
    prompts = [Prompt(r.token_ids, r.token_ids) for r in model.setup.elsewhere]
    pairs = zip(prompts, answers_elsewhere(model), strict=True)
    episodes = [Episode.of_completion(prompt, answer) for prompt, answer in pairs]
    return student_side(model.model, model.plan, episodes, model.setup.config)


def held_against(original: Side, model: LoadedModel) -> Elsewhere:
    """What a distilled model answers, and how far it is from the original on that one's answers.

    The divergences are KL(distilled ‖ original), the reverse, and KL(original ‖ distilled), at
    temperature 1 and over the whole vocabulary.
    """
    setup = model.setup
    said = [episode.scored_ids for episode in original.episodes]
    answers = answers_elsewhere(model)
    side = student_side(model.model, model.plan, original.episodes, setup.config)
    figures = _figures(said, answers, kl_both_ways(side, original, temperature=1.0))
    return Elsewhere(card_of(figures, setup), _rows(said, answers, figures, setup))


def common_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(one, other, strict=False)
    return [*(a == b for a, b in pairs), False].index(False)


def answers_elsewhere(model: LoadedModel) -> list[list[int]]:
    """Token ids of the likeliest answers, with the end where there is one."""
    params = SamplingParams(ANSWER_TOKENS, temperature=0.0)
    rollouts = model.engine.generate([r.token_ids for r in model.setup.elsewhere], params)
    return [rollout.completion_token_ids for rollout in rollouts]


def _figures(
    original: Sequence[Sequence[int]], distilled: Sequence[Sequence[int]], apart: KL
) -> dict[str, PerRequest]:
    pairs = [*zip(original, distilled, strict=True)]
    each = [1.0] * len(pairs)
    return {
        "agreement": PerRequest([float(theirs == ours) for theirs, ours in pairs], each),
        "common_prefix": PerRequest([common_tokens(*p) / len(p[0]) for p in pairs], each),
        "reverse_kl": apart.reverse_kl,
        "forward_kl": apart.forward_kl,
    }


def card_of(figures: dict[str, PerRequest], setup: Setup) -> dict[str, Any]:
    """What a scorecard has of it."""
    return {
        **means_of(figures, [request.kind for request in setup.elsewhere]),
        "unit": "nats a token of the original's greedy answers; agreement: equal greedy answers",
        "decoding": {"temperature": 0.0, "max_completion_tokens": ANSWER_TOKENS},
        "file": setup.config.elsewhere_data,  # None: those that come with opcd
    }


def means_of(figures: dict[str, PerRequest], kinds: Sequence[str]) -> dict[str, Any]:
    """Means with their intervals, and the means of each kind of request; a kind may be ""."""
    members_of: dict[str, list[int]] = {}
    for i, kind in enumerate(kinds):
        if kind:
            members_of.setdefault(kind, []).append(i)
    return {
        "prompts": len(kinds),
        **{name: figure.summary(share=name in SHARES) for name, figure in figures.items()},
        "by_kind": {
            kind: {"prompts": len(members)}
            | {name: _of(figure, members).mean for name, figure in figures.items()}
            for kind, members in members_of.items()
        },
    }


def figures_in(rows: Sequence[Mapping[str, Any]]) -> dict[str, PerRequest]:
    """The figures again, from the answers."""
    each = [1.0] * len(rows)
    tokens = [float(row["tokens"]) for row in rows]
    return {
        "agreement": PerRequest([float(row["same"]) for row in rows], each),
        "common_prefix": PerRequest([row["common_prefix"] for row in rows], each),
        **{
            name: PerRequest([r[name] * n for r, n in zip(rows, tokens, strict=True)], tokens)
            for name in ("reverse_kl", "forward_kl")
        },
    }


def _of(figure: PerRequest, members: Sequence[int]) -> PerRequest:
    return PerRequest([figure.totals[i] for i in members], [figure.counts[i] for i in members])


def _rows(
    original: Sequence[Sequence[int]],
    distilled: Sequence[Sequence[int]],
    figures: dict[str, PerRequest],
    setup: Setup,
) -> list[dict[str, Any]]:
    return [
        {
            **({"kind": request.kind} if request.kind else {}),
            "prompt": list(request.example.messages),
            "original": setup.chat.decode(theirs),
            "distilled": setup.chat.decode(ours),
            "same": theirs == ours,
            "tokens": figures["reverse_kl"].counts[i],
            "common_prefix": figures["common_prefix"].totals[i],
            "reverse_kl": _of(figures["reverse_kl"], [i]).mean,
            "forward_kl": _of(figures["forward_kl"], [i]).mean,
        }
        for i, (request, theirs, ours) in enumerate(
            zip(setup.elsewhere, original, distilled, strict=True)
        )
    ]
