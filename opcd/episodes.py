"""What is scored: token ids as both models see them, and which of them count."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from opcd.errors import InputError


class Span(NamedTuple):
    """Scored tokens that stand next to each other: where in either model's ids, and how many."""

    student_start: int
    teacher_start: int
    length: int


class Prompt(NamedTuple):
    """What both models are given before anything is sampled."""

    student_ids: list[int]  # without the context
    teacher_ids: list[int]  # with the context, behind its shared prefix
    context: str = ""  # its name

    @property
    def key(self) -> int:
        """64 bits that tell prompts apart, the same in every process."""
        text = f"{self.student_ids} {self.teacher_ids} {self.context}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Episode:
    """One sequence as both models see it, and which of its tokens count.

    The tokens of a span are the same in `student_ids` and `teacher_ids`, each predicted by the one
    in front of it. Raises InputError where that is not so.
    """

    student_ids: Sequence[int]  # prompt and completions in place
    teacher_ids: Sequence[int]  # the same completions in place, behind the prefix of `context`
    spans: tuple[Span, ...]  # in order
    context: str = ""  # what the teacher sees in front: a name that it knows
    finish: str = "stop"  # "stop", or "length" where the last completion was cut
    # How its tokens are scored: the share of forward KL in their divergence, what that weighs, and
    # what −log p of the tokens themselves weighs.
    forward_share: float = 0.0
    divergence_weight: float = 1.0
    likelihood_weight: float = 0.0
    origin: str = "student"  # who wrote what is scored, for metrics

    def __post_init__(self) -> None:
        student_end = teacher_end = 0
        for span in self.spans:
            ours, theirs = span.student_start, span.teacher_start
            end = ours + span.length
            first = max(1, student_end), max(1, teacher_end)
            scored = list(self.student_ids[ours:end])
            same = scored == list(self.teacher_ids[theirs : theirs + span.length])
            if ours < first[0] or theirs < first[1] or len(scored) != span.length or not same:
                raise InputError(
                    f"a span must hold at least one token that stands in both models' ids behind "
                    f"another one, and spans must not overlap, got {span} of "
                    f"{len(self.student_ids)} student and {len(self.teacher_ids)} teacher tokens"
                )
            student_end, teacher_end = end, theirs + span.length
        if not self.spans or not all(span.length > 0 for span in self.spans):
            raise InputError(
                f"an episode must hold at least one token that is scored, got spans {self.spans}; "
                f"drop it"
            )

    @classmethod
    def of_completion(
        cls, prompt: Prompt, completion_ids: Sequence[int], finish: str = "stop"
    ) -> "Episode":
        """A completion behind a prompt, all of it scored."""
        span = Span(len(prompt.student_ids), len(prompt.teacher_ids), len(completion_ids))
        return cls(
            [*prompt.student_ids, *completion_ids],
            [*prompt.teacher_ids, *completion_ids],
            (span,),
            prompt.context,
            finish,
        )

    @property
    def scored_tokens(self) -> int:
        """How many tokens count."""
        return sum(span.length for span in self.spans)

    @property
    def student_spans(self) -> tuple[tuple[int, int], ...]:
        """Start and length of each span in the student's ids."""
        return tuple((span.student_start, span.length) for span in self.spans)

    @property
    def teacher_spans(self) -> tuple[tuple[int, int], ...]:
        """Start and length of each span in the teacher's ids."""
        return tuple((span.teacher_start, span.length) for span in self.spans)

    @property
    def scored_ids(self) -> list[int]:
        """The tokens that count."""
        return [t for start, n in self.student_spans for t in self.student_ids[start : start + n]]


def scored_tokens(episodes: Iterable[Episode]) -> list[int]:
    """How many tokens count in each."""
    return [episode.scored_tokens for episode in episodes]
