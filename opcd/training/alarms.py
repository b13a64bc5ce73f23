"""Alarms: signs that a run goes wrong, which its loss does not show.

A student that never says what the context asks for, or that has settled on one answer for
everything, has a falling loss and a low divergence: both are measured on what it says itself. So
an alarm compares with the prompted teacher, on validation prompts, and says what to do. Each is a
function of the rows of metrics.jsonl so far. Runs that are quoted below are of SmolLM2-135M, in
studies/results/guided.jsonl and tests/opcd/training/alarm_runs.json.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from opcd.config import TrainConfig
from opcd.evaluation.intervals import CHANCE, wilson_interval
from opcd.evaluation.spikes import WINDOW, Spike, spikes

Row = Mapping[str, Any]

# coverage. One validation may stay behind by chance, and the first steps are the warm-up's: of 16
# runs that ended above 75 %, all were right on something by step 15.
STALLED_VALIDATIONS, STALLED_STEPS = 3, 20
# One step's loss varies by a tenth with its prompts, the mean of ten by 3 %. Where plain reverse KL
# failed, the steps that followed were 10 % lower than the first ten.
LOSS_STEPS, LOSS_FALLS = 10, 0.95
# The gap is of the same completions every time. Where it was 0.1 nats a token, the student says by
# itself what the teacher says; where it has halved, the behaviour is being learned.
GAP_IMPROVES, GAP_LEAST, GAP_HALVED = 0.95, 0.1, 0.5
# entropy. A student that matches its teacher has the teacher's entropy, on labels and on prose: 0.9
# to 1.1 times in a run that went well, 0.4 times in one that passed through a single answer. With a
# quarter it has given up most of what the teacher leaves open, which below 0.2 nats a token is
# nothing. Twice in a row, since few samples may tell so by chance.
ENTROPY_SHARE, ENTROPY_LEAST, ENTROPY_TIMES = 0.25, 0.2, 2
# length. Chat models that are asked for a label begin with every completion cut, and end by
# themselves within ten steps (1.0 to 0.2): so twice ten, and not fewer in the second.
CUT_MORE, CUT_STEPS, CUT_FALLS = 0.5, 10, 0.9
# empty. A fifth of the answers is no chance.
EMPTY_MORE = 0.2
# constant. A run that learns two behaviours may pass through the easier one: one that went well
# gave it to all of 40 prompts after step 10, to 45 % after step 15 and to 88 % after step 20.
CONSTANT, CONSTANT_MORE, CONSTANT_STEPS = 0.95, 0.2, 10
# divergence. Neither hard prompts nor a step that went too far last that long.
DIVERGED_STEPS = 10
# prompt. Most answers are none.
NO_ANSWERS = 0.5


class Alarm(NamedTuple):
    """What goes wrong, how that is known, and what to do."""

    name: str
    reason: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} ({self.evidence}); {self.remedy}"


class Alarms:
    """The alarms of a run, each raised once."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._rows: list[Row] = []
        self._raised: set[str] = set()

    @classmethod
    def from_rows(cls, config: TrainConfig, rows: Sequence[Row]) -> "Alarms":
        """Those of a run that goes on, from its metrics.jsonl; what it raised is in "alarms"."""
        alarms = cls(config)
        alarms._rows = [*rows]
        alarms._raised = {name for row in rows for name in row.get("alarms", ())}
        return alarms

    def look(self, metrics: Row) -> list[Alarm]:
        """What the next row raises: a step's metrics, with or without a validation, or that alone.

        What a validation must hold is what `validation.Validation.measure` returns.
        """
        self._rows.append(metrics)
        found = [a for a in alarms_of(self._rows, self._config) if a.name not in self._raised]
        self._raised |= {alarm.name for alarm in found}
        return found

    @property
    def spikes(self) -> list[Spike]:
        """Steps that stood out so far, whether or not it lasted."""
        return spikes(self._rows)


class Course(NamedTuple):
    """A run so far."""

    config: TrainConfig
    steps: list[Row]
    validations: list[Row]  # each with its "step"

    @property
    def prompted(self) -> Row:
        """What the prompted teacher answers, the same at every validation."""
        found: Row = self.validations[-1]["prompted"]
        return found


def alarms_of(rows: Sequence[Row], config: TrainConfig) -> list[Alarm]:
    """What is wrong at the last of the rows."""
    course = Course(
        config,
        [row for row in rows if "loss" in row],
        [
            {"step": row["step"], **row["validation"]}
            for row in rows
            if _tells(row.get("validation", {}))
        ],
    )
    checks = [_divergence]
    if course.validations:
        checks.append(_length)
    if "validation" in rows[-1] and course.validations:
        checks += [_prompt, _coverage, _entropy, _empty, _constant]
    return [alarm for check in checks if (alarm := check(course)) is not None]


def _tells(found: Row) -> bool:
    """Whether a validation holds what alarms ask for.

    Versions before kept nothing of the prompted teacher, then not of how many requests.
    """
    return "prompted" in found and ("n" in found or "accuracy" not in found)


def _coverage(course: Course) -> Alarm | None:
    """Validations do not improve, though the loss falls."""
    seen, losses = course.validations, [row["loss"] for row in course.steps]
    before, since = _parted(seen, STALLED_VALIDATIONS, STALLED_STEPS)
    if not before or len(losses) < 2 * LOSS_STEPS:
        return None
    was, now = fmean(losses[:LOSS_STEPS]), fmean(losses[LOSS_STEPS:])
    missing = (_accuracy_stalls if "accuracy" in seen[-1] else _gap_stalls)(course, before, since)
    if now > LOSS_FALLS * was or not missing:
        return None
    return Alarm(
        "coverage",
        "the loss falls, and what the prompted teacher says is not learned",
        f"{missing}; loss {was:.3f} in the first {LOSS_STEPS} steps, {now:.3f} since",
        _more_of_it(course)
        if course.config.shown_share
        else "start anew with guided_share 0.25: the prompted teacher then shows it",
    )


def _parted(seen: Sequence[Row], count: int, steps: int) -> tuple[Sequence[Row], Sequence[Row]]:
    """Validations before, and the last: at least `count`, and all of the last `steps` steps."""
    recent = sum(found["step"] > seen[-1]["step"] - steps for found in seen)
    last = max(count, recent)
    return seen[:-last], seen[-last:]


def _accuracy_stalls(course: Course, before: Sequence[Row], since: Sequence[Row]) -> str:
    """How far accuracy has come, if not beyond chance as far as with the prompt; else ""."""
    best, later = (max(part, key=lambda found: found["accuracy"]) for part in (before, since))
    if later["accuracy"] > best["accuracy"] or not _behind(best):
        return ""
    return (
        f"accuracy {best['accuracy']:.1%} by step {before[-1]['step']} and not above by step "
        f"{since[-1]['step']}, prompted {course.prompted['accuracy']:.1%}"
    )


def _gap_stalls(course: Course, before: Sequence[Row], since: Sequence[Row]) -> str:
    """How wide the gap to the teacher still is, if it does not close; else ""."""
    least, later = (min(found["gap"] for found in part) for part in (before, since))
    first, now = before[0]["gap"], since[-1]["gap"]
    if later < GAP_IMPROVES * least or now < max(GAP_LEAST, GAP_HALVED * first):
        return ""
    return (
        f"the prompted teacher's answers are {now:.2f} nats a token less likely to the student "
        f"after step {since[-1]['step']}, {least:.2f} by step {before[-1]['step']}"
    )


def _entropy(course: Course) -> Alarm | None:
    """The student's own completions hold little of what the teacher finds possible there."""
    seen = course.validations[-ENTROPY_TIMES:]
    if len(seen) < ENTROPY_TIMES or not all(
        found["teacher_entropy"] >= ENTROPY_LEAST
        and found["student_entropy"] < ENTROPY_SHARE * found["teacher_entropy"]
        for found in seen
    ):
        return None
    now = seen[-1]
    covering = "" if course.config.forward_share else " and forward_share 0.5"
    return Alarm(
        "entropy",
        "the student settles on little of what the teacher finds possible",
        f"entropy {now['student_entropy']:.3f} nats a token on its own completions, the teacher's "
        f"there {now['teacher_entropy']:.3f}, after step {now['step']}",
        f"{_slower(course)}{covering}",
    )


def _length(course: Course) -> Alarm | None:
    """Completions run into the limit, and the prompted teacher's do not."""
    config, share = course.config, course.config.shown_share
    cut = [row["truncated_share"] for row in course.steps[-2 * CUT_STEPS :]]
    if len(cut) < 2 * CUT_STEPS or share == 1:
        return None
    usual = course.prompted["truncated_share"]
    # A guided share of the completions is cut as often as the teacher's are.
    before, now = (
        (fmean(part) - share * usual) / (1 - share) for part in (cut[:CUT_STEPS], cut[CUT_STEPS:])
    )
    if now < usual + CUT_MORE or now < CUT_FALLS * before:
        return None
    return Alarm(
        "length",
        "completions run into max_completion_tokens, and the prompted teacher's do not",
        f"{now:.0%} cut at {config.max_completion_tokens} tokens in the last {CUT_STEPS} steps, "
        f"{before:.0%} in those before, prompted {usual:.0%}",
        _slower(course)
        if share
        else "start anew with guided_share 0.25: what the prompted teacher writes ends",
    )


def _empty(course: Course) -> Alarm | None:
    """Answers without a text, that training has not put an end to or has brought about."""
    now, usual = course.validations[-1], course.prompted["empty_share"]
    if now["step"] == 0 or now["empty_share"] <= usual + EMPTY_MORE:
        return None
    return Alarm(
        "empty",
        "the student answers with nothing, and the prompted teacher does not",
        f"{now['empty_share']:.0%} empty after step {now['step']}, prompted {usual:.0%}",
        _slower(course),
    )


def _constant(course: Course) -> Alarm | None:
    """One answer for everything."""
    seen, usual = course.validations, course.prompted["commonest_share"]
    before, since = _parted(seen, 1, CONSTANT_STEPS)
    least = max(CONSTANT, usual + CONSTANT_MORE)
    if not before or any(x["commonest_share"] < least for x in [before[-1], *since]):
        return None
    now = seen[-1]
    return Alarm(
        "constant",
        "the student gives one answer to everything, and the prompted teacher does not",
        f"{now['commonest_share']:.0%} the same after step {now['step']}, prompted {usual:.0%}",
        _slower(course)
        if course.config.shown_share
        else "start anew with guided_share 0.25: the prompted teacher then shows the others",
    )


def _divergence(course: Course) -> Alarm | None:
    """The divergence has risen, and stays."""
    # Steps without completions of the student's own have none; where no step has any, what is
    # minimised on the others counts.
    measured = [row for row in course.steps if row.get("divergence") is not None]
    recent = (measured or course.steps)[-(WINDOW + DIVERGED_STEPS) :]
    found = spikes(recent)[-DIVERGED_STEPS:]
    if len(found) < DIVERGED_STEPS or found[0].step < recent[-DIVERGED_STEPS]["step"]:
        return None
    low, high = (f(spike.divergence for spike in found) for f in (min, max))
    return Alarm(
        "divergence",
        "the student has left its teacher",
        f"{low:.2f} to {high:.2f} nats a token in steps {found[0].step} to {found[-1].step}, the "
        f"median before them {found[0].median:.3f}",
        _slower(course),
    )


def _prompt(course: Course) -> Alarm | None:
    """What is to be distilled is nothing good."""
    config, prompted, base = course.config, course.prompted, course.validations[0]
    if prompted["truncated_share"] >= NO_ANSWERS:
        return Alarm(
            "prompt",
            "most answers of the prompted teacher are cut",
            f"{prompted['truncated_share']:.0%} at {config.max_completion_tokens} tokens",
            "raise max_completion_tokens, or let the context ask for less",
        )
    if prompted["empty_share"] >= NO_ANSWERS:
        return Alarm(
            "prompt",
            "most answers of the prompted teacher are empty",
            f"{prompted['empty_share']:.0%}",
            "mend the context",
        )
    if base["step"] > 0 or "accuracy" not in base or _behind(base):
        return None
    return Alarm(
        "prompt",
        "the context does not make the teacher's answers better, as far as validation tells",
        f"accuracy {base['accuracy']:.1%} without it, {prompted['accuracy']:.1%} with it, of "
        f"{base['n']}",
        "mend the context, or validate on more",
    )


def _behind(found: Row) -> bool:
    """Whether the student was less accurate than the prompted teacher, beyond chance."""
    if "behind_prompted" in found:
        apart = found["behind_prompted"]
        behind: bool = apart["mean"] > 0 and apart["p_value"] < CHANCE
        return behind
    # Versions before did not compare request by request: 95 % intervals that are apart.
    n, ours, theirs = found["n"], found["accuracy"], found["prompted"]["accuracy"]
    return wilson_interval(theirs * n, n)[0] > wilson_interval(ours * n, n)[1]


def _slower(course: Course) -> str:
    return f"start anew with a lower learning_rate{_than_the_rate(course)}"


def _more_of_it(course: Course) -> str:
    return (
        f"start anew with a higher learning_rate{_than_the_rate(course)}, or with more steps than "
        f"{course.config.steps}"
    )


def _than_the_rate(course: Course) -> str:
    """The peak so far: a run without a rate of its own has taken one for the model's size."""
    rates = [row["learning_rate"] for row in course.steps if "learning_rate" in row]
    return f" than {max(rates):g}" if rates else ""
