"""Whether a run is worth its money: a word, the reason, the evidence, and what to set.

A claim is made where the requests show it, by the far end of an interval; where they show neither
that a prompt is worth a run nor that it is not, they are too few.
"""

from collections.abc import Sequence
from typing import NamedTuple

from opcd.evaluation.constant import hardly_better
from opcd.evaluation.intervals import Difference, wilson_interval

Interval = tuple[float, float]  # 95 %

UNCHANGED = 0.1  # of the answers: so few changes are not worth a run
SILENT = 0.05  # nats a token: the model says the same with the same confidence
WORTH = 0.2  # of the requests: a prompt that is given to a model for its answers gains more
BROKEN = 0.5  # of the prompted answers, cut or empty
APART = 0.1  # of the gap: a difference of two passes that is not small beside what is learned
# See `_needs_guidance`. At 135M plain runs learned 0.00 and 0.12 (voice_assistant, safety), and of
# 0.24 and 0.33 one behaviour of two and a third (policy, structured_output); docs/commands.md.
UNMET = 0.2


class Example(NamedTuple):
    """A request, and what the prompted model answers without the prompt and with it."""

    request: str
    without: str
    prompted: str


class Measured(NamedTuple):
    """What the models make of a sample of the requests.

    The prompted model is the teacher; without one of its own that is the student, before training.
    """

    requests: int
    changed: float  # share of the prompted model's greedy answers that differ without the prompt
    changed_interval: Interval
    shift: float  # nats a token of its prompted answers that it misses itself without the prompt
    shift_interval: Interval
    gap: float  # nats a token of them that the student misses, which never sees the prompt
    gap_interval: Interval
    unmet: float  # share of those nats at hard tokens behind the first hard ones of an answer
    hard_tokens: float  # of an answer: the student finds them less likely than one in a hundred
    tokens: float  # of an answer
    likelihood: list[float]  # median p of the answers' first tokens for the student
    missed_at: str  # the token at which most nats are missed
    cut: float  # share of the prompted answers that run into max_completion_tokens
    empty: float  # share of them that are empty
    empty_context: float | None = None  # nats a token between equal prompts; see `_passes_differ`
    reading_s: float | None = None  # of the context, in a request; None if lost in the noise
    base: float | None = None  # accuracy of the student without the prompt, where it can be judged
    unprompted: float | None = None  # of the teacher without it; None where that is the student
    prompted: float | None = None
    gain: Difference | None = None  # by the prompt, over whichever of the other two gains least
    constant: float | None = None  # accuracy of the best one answer for all; None if all share it
    examples: Sequence[Example] = ()  # to look at: a verdict does not


class Found(NamedTuple):
    """What a check has found; a verdict is a function of it and of nothing else."""

    wrong_inputs: str = ""  # how the models' inputs are not what they must be
    memory_needed: int | None = None  # bytes, at the peak; None where that is not known
    memory_free: int | None = None
    fits_with: str = ""  # settings with which it would fit; "" if none are known
    disk_needed: int | None = None  # bytes
    disk_free: int | None = None
    guided_share: float = 0.0  # of what is trained on, the share that the student does not write
    expected_requests: float | None = None  # between two changes of the prompt, as the user says
    pays_after: float | None = None  # requests until a run has paid for itself
    measured: Measured | None = None  # None: the models were not asked

    @property
    def fits(self) -> bool | None:
        """Whether a run's memory does; None where nobody knows."""
        if self.memory_needed is None or self.memory_free is None:
            return None
        return self.memory_needed <= self.memory_free


class Verdict(NamedTuple):
    """One of eight words, and what stands behind it."""

    word: str
    reason: str
    evidence: str
    setting: str  # what to set, or to do; "" where nothing is to be done

    @property
    def goes(self) -> bool:
        """Whether a run as it is configured makes sense."""
        return self.word == "go"

    def __str__(self) -> str:
        advice = f"; {self.setting}" if self.setting else ""
        return f"{self.word}: {self.reason} ({self.evidence}){advice}"


def hindrance(found: Found) -> Verdict | None:
    """What speaks against a run before any model is loaded; None where nothing does."""
    return _wrong_inputs(found) or _too_much_memory(found) or _too_large_for_the_disk(found)


def verdict(found: Found) -> Verdict:
    """The first of the reasons against a run that holds; "go" where none does."""
    if known := hindrance(found):
        return known
    measured = found.measured
    assert measured is not None, "nothing was against asking the models"
    return (
        _changes_nothing(measured)
        or _breaks_answers(measured)
        or _gains_nothing(measured)
        or _too_few(measured)
        or _passes_differ(measured)
        or _does_not_pay(found)
        or _needs_guidance(measured, found.guided_share)
        or _go(measured)
    )


def _wrong_inputs(found: Found) -> Verdict | None:
    if not found.wrong_inputs:
        return None
    return Verdict(
        "wrong inputs",
        "the models are not given what they must be",
        found.wrong_inputs,
        "look at the chat template, and at chat_template_args",
    )


def _too_much_memory(found: Found) -> Verdict | None:
    needed, free = found.memory_needed, found.memory_free
    if needed is None or free is None or needed <= free:
        return None
    return Verdict(
        "does not fit",
        "a step needs more memory than is free",
        f"{needed / 1e9:.1f} GB of {free / 1e9:.1f} GB",
        f"set {found.fits_with}" if found.fits_with else "take a smaller model",
    )


def _too_large_for_the_disk(found: Found) -> Verdict | None:
    needed, free = found.disk_needed, found.disk_free
    if needed is None or free is None or needed <= free:
        return None
    return Verdict(
        "does not fit",
        "a run writes more than there is room for",
        f"{needed / 1e9:.1f} GB of {free / 1e9:.1f} GB on the disk of output_dir",
        "make room, name another output_dir, or lower keep_checkpoints",
    )


def _changes_nothing(measured: Measured) -> Verdict | None:
    changed, shift = measured.changed_interval[1], measured.shift_interval[1]
    if changed > UNCHANGED or shift > SILENT:
        return None
    return Verdict(
        "the prompt changes nothing",
        "the model answers the same without it",
        f"at most {changed:.0%} of answers are others, and at most {shift:.3f} nats a token are "
        f"missed, by {measured.requests} requests",
        "leave it out",
    )


def _breaks_answers(measured: Measured) -> Verdict | None:
    for what, share in (
        ("cut at max_completion_tokens", measured.cut),
        ("empty", measured.empty),
    ):
        if share > BROKEN:
            return Verdict(
                "the prompt does not work",
                f"most of the prompted model's answers are {what}",
                f"{share:.0%} of {measured.requests}",
                "look at what it answers, and mend the prompt or the limit",
            )
    return None


def _gains_nothing(measured: Measured) -> Verdict | None:
    """Of requests whose answers are judged."""
    gain, prompted, constant = measured.gain, measured.prompted, measured.constant
    if gain is None or prompted is None:
        return None
    if gain.less or (not gain.more and _at_most(gain) <= WORTH):
        return Verdict(
            "the prompt does not work",
            "answers are worse with it" if gain.less else "it gains little, if anything",
            _gain(measured),
            "mend the prompt: demonstrations carry more than instructions",
        )
    if gain.more and constant is not None and hardly_better(prompted, constant):
        return Verdict(
            "the prompt does not work",
            "the prompted model is hardly better than one answer for everything",
            f"{_gain(measured)}; the commonest answer alone has {constant:.0%}",
            "mend the prompt: demonstrations carry more than instructions",
        )
    return None


def _at_most(gain: Difference) -> float:
    """The largest gain that is likely by these requests.

    Where all of them agree, drawing them anew shows no spread; a gain that none of n shows can
    still be as large as Wilson's interval of 0 in n.
    """
    return max(gain.interval[1], wilson_interval(0, gain.requests)[1])


def _too_few(measured: Measured) -> Verdict | None:
    if measured.gain is not None:
        shown = measured.gain.more
    else:
        changed, shift = measured.changed_interval[0], measured.shift_interval[0]
        shown = changed > UNCHANGED or shift > SILENT
    if shown:
        return None
    return Verdict(
        "too few requests",
        "they show neither that the prompt is worth a run nor that it is not",
        _gain(measured),
        "give it more, or score base and prompted model alone on all of them (opcd eval with "
        "--distilled none)",
    )


def _passes_differ(measured: Measured) -> Verdict | None:
    """Behind an empty context teacher and student are given the same tokens.

    What they then differ by is an error of the passes that training would learn; rounding is left
    out of `empty_context` already.
    """
    apart = measured.empty_context
    if apart is None or apart <= APART * measured.gap:
        return None
    return Verdict(
        "wrong inputs",
        "teacher and student do not compute the same from the same tokens",
        f"{apart:.2g} nats a token apart behind an empty context, where the gap is "
        f"{measured.gap:.2g}",
        "set dtype to float32, and report the plan that `opcd train` prints for this model",
    )


def _does_not_pay(found: Found) -> Verdict | None:
    if found.pays_after is None or found.expected_requests is None:
        return None
    if found.expected_requests >= found.pays_after:
        return None
    return Verdict(
        "keep the prompt",
        "too few requests come before the prompt is changed again",
        f"{found.expected_requests:,.0f} expected; {found.pays_after:,.0f} that read it whole pay "
        f"for a run, and more with a prefix cache",
        "keep it in the request, with the server's prefix cache",
    )


def _needs_guidance(measured: Measured, guided_share: float) -> Verdict | None:
    """On its own samples a model comes to a place only with the probability of all before it.

    A hard token is met once those in front of it are learned. The first two are, as labels show,
    whose two tokens are as hard as any; what is missed at later ones waits for them. As a share of
    all that is missed: a long answer with a few of them is learned by the rest of it.
    """
    if guided_share or measured.unmet <= UNMET:
        return None
    return Verdict(
        "needs guided rollouts",
        "by itself the model may never say what the prompt asks for",
        f"{measured.unmet:.0%} of the gap lies at tokens less likely than one in a hundred that "
        f"come after two others of that kind; {measured.hard_tokens:.1f} of {measured.tokens:.1f} "
        f"tokens of an answer are so unlikely",
        "set guided_share to 0.25",
    )


def _go(measured: Measured) -> Verdict:
    reach = "and the model can reach what it asks for"
    if measured.gain is not None:
        return Verdict("go", f"the prompt works, {reach}", _gain(measured), "")
    return Verdict(
        "go",
        f"the prompt changes what the model says, {reach}",
        _gain(measured),
        "nobody has judged its answers with the prompt: read some, they are what is learned",
    )


def _gain(measured: Measured) -> str:
    """What a prompt gains, or changes where nothing is judged."""
    changed = f"{measured.changed:.0%} of {measured.requests} answers changed"
    gain = measured.gain
    if gain is None:
        low, high = measured.shift_interval
        return f"{changed}, {low:.2f} – {high:.2f} nats a token missed without it"
    low, high = gain.interval
    teacher = "" if measured.unprompted is None else f" ({measured.unprompted:.0%} by the teacher)"
    return (
        f"accuracy {measured.base:.0%} without it{teacher}, {measured.prompted:.0%} with it: "
        f"{100 * gain.mean:+.0f} points ({100 * low:+.0f} – {100 * high:+.0f}), {changed}"
    )
