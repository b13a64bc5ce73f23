"""Whether a run is worth its money: a word, the reason, the evidence, and what to set."""

from typing import NamedTuple

Interval = tuple[float, float]


class Found(NamedTuple):
    """What a check has measured; a verdict is a function of it and of nothing else."""

    requests: int  # in the sample
    changed: float  # share of the greedy answers that the context changes
    changed_interval: Interval
    gap: float  # nats a token that the model without the context misses of the prompted answers
    gap_interval: Interval
    hard_tokens: float  # of a prompted answer behind its first two: below 0.01 without the context
    cut: float  # share of prompted answers that run into max_completion_tokens
    empty: float  # share of prompted answers that are empty
    base: float | None = None  # accuracy without the context, where it can be judged
    base_interval: Interval | None = None
    prompted: float | None = None  # with it
    prompted_interval: Interval | None = None
    constant: float | None = None  # accuracy of the best constant answer
    wrong_inputs: str = ""  # how the models' inputs are not what they must be
    guided_share: float = 0.0  # as configured
    needed_bytes: int = 0  # of memory, at the peak
    room_bytes: int = 1
    fits_with: str = ""  # a setting with which it would fit; "" if none is known
    pays_after: float | None = None  # requests until a run has paid for itself
    expected_requests: float | None = None  # between two changes of the prompt, as the user says


class Verdict(NamedTuple):
    """One of seven words, and what stands behind it."""

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


UNCHANGED = 0.1  # of the answers: so few changes are not worth a run
SILENT_GAP = 0.05  # nats a token: the models say the same with the same confidence
# See `_needs_guidance`. At 135M the examples have 0.2 (intents) and 0.4 (safety), which plain runs
# learn, and 1.9 (policy), which they learn in part (docs/results.md).
HARD_TOKENS = 1.0
BROKEN = 0.5  # of the prompted answers, cut or empty


def verdict(found: Found) -> Verdict:
    """The first of the reasons against a run that holds; "go" where none does."""
    for rule in (
        _inputs,
        _does_not_fit,
        _does_not_work,
        _changes_nothing,
        _does_not_pay,
        _needs_guidance,
    ):
        if said := rule(found):
            return said
    gain = f"gap {found.gap:.2f} nats a token, {found.changed:.0%} of answers changed"
    if found.prompted is not None:
        gain = f"accuracy {found.base:.0%} without the prompt, {found.prompted:.0%} with it, {gain}"
    return Verdict("go", "the prompt works, and the model can reach what it asks for", gain, "")


def _inputs(found: Found) -> Verdict | None:
    if not found.wrong_inputs:
        return None
    return Verdict(
        "wrong inputs",
        "the models are not given what they must be",
        found.wrong_inputs,
        "look at the chat template, and at chat_template_args",
    )


def _does_not_fit(found: Found) -> Verdict | None:
    if found.needed_bytes <= found.room_bytes:
        return None
    evidence = f"{found.needed_bytes / 1e9:.1f} GB of {found.room_bytes / 1e9:.1f} GB of memory"
    advice = f"set {found.fits_with}" if found.fits_with else "take a smaller model"
    return Verdict("does not fit", "a step needs more than there is", evidence, advice)


def _does_not_work(found: Found) -> Verdict | None:
    for what, share in (("cut at max_completion_tokens", found.cut), ("empty", found.empty)):
        if share > BROKEN:
            return Verdict(
                "the prompt does not work",
                f"most of the prompted model's answers are {what}",
                f"{share:.0%} of {found.requests}",
                "look at what it answers, and mend the prompt or the limit",
            )
    if found.prompted is None or found.base_interval is None or found.prompted_interval is None:
        return None
    evidence = f"{found.base:.0%} without it, {found.prompted:.0%} with it, of {found.requests}"
    if found.prompted_interval[0] <= found.base_interval[1]:
        return Verdict(
            "the prompt does not work",
            "it gains nothing beyond chance",
            evidence,
            "mend the prompt, or give it more requests with answers",
        )
    if found.constant is not None and found.prompted_interval[0] <= found.constant:
        return Verdict(
            "the prompt does not work",
            "the prompted model is no better than one answer for everything",
            f"{evidence}; the commonest answer alone has {found.constant:.0%}",
            "mend the prompt: demonstrations carry more than instructions",
        )
    return None


def _changes_nothing(found: Found) -> Verdict | None:
    if found.changed_interval[0] > UNCHANGED or found.gap_interval[0] > SILENT_GAP:
        return None
    return Verdict(
        "the prompt changes nothing",
        "the model answers the same without it",
        f"{found.changed:.0%} of {found.requests} answers changed, gap {found.gap:.3f} nats a "
        f"token",
        "leave it out",
    )


def _does_not_pay(found: Found) -> Verdict | None:
    if found.pays_after is None or found.expected_requests is None:
        return None
    if found.expected_requests >= found.pays_after:
        return None
    return Verdict(
        "keep the prompt",
        "too few requests come before the prompt is changed again",
        f"{found.expected_requests:,.0f} expected, {found.pays_after:,.0f} pay for a run",
        "keep it in the request, with the server's prefix cache",
    )


def _needs_guidance(found: Found) -> Verdict | None:
    """On its own samples a model meets a place only once all places before it are learned.

    The first place of an answer is met in every sample, so that a label is learned however
    unlikely it is; a format with more such places is not, within the steps of a run.
    """
    if found.guided_share or found.hard_tokens <= HARD_TOKENS:
        return None
    return Verdict(
        "needs guided rollouts",
        "the model never says by itself what the prompt asks for",
        f"behind its first two a prompted answer holds {found.hard_tokens:.1f} tokens that it "
        f"finds less likely than one in a hundred",
        "set guided_share to 0.25",
    )
