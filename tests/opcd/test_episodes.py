"""What an episode may be."""

import pytest

from opcd.episodes import Episode, Prompt, Span
from opcd.errors import InputError


def test_a_completion_is_one_span_in_both_models_ids() -> None:
    episode = Episode.of_completion(Prompt([1, 2, 3], [9, 8], "bank"), [5, 6], "length")
    assert episode.student_ids == [1, 2, 3, 5, 6]
    assert episode.teacher_ids == [9, 8, 5, 6]
    assert episode.spans == (Span(3, 2, 2),)
    assert (episode.context, episode.finish, episode.scored_tokens) == ("bank", "length", 2)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((), "at least one token that is scored"),
        ((Span(2, 2, 0),), "at least one token"),
        ((Span(0, 0, 2),), "behind another one"),  # nothing predicts the first token
        ((Span(3, 3, 2),), "got Span"),  # beyond the end
        ((Span(1, 2, 1),), "both models' ids"),  # other tokens
        ((Span(1, 1, 2), Span(2, 2, 1)), "must not overlap"),
    ],
)
def test_spans_that_are_none_are_refused(spans: tuple[Span, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Episode([4, 5, 6, 7], [3, 5, 6, 7], spans)
