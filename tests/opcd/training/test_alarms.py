"""Alarms as functions of metrics: what raises each, what just does not, and real runs."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import opcd
from opcd.cli import main
from opcd.config import TrainConfig
from opcd.runtime.files import read_metrics
from opcd.runtime.progress import Progress
from opcd.training.alarms import Alarm, Alarms
from opcd.training.checkpoint import list_checkpoints
from opcd.training.run import _raise_alarms
from tests.conftest import in_groups

# Courses of runs of the examples at 135M, with what they were validated by.
RUNS = json.loads((Path(__file__).parent / "alarm_runs.json").read_text(encoding="utf-8"))
PROMPTED = {"empty_share": 0.0, "commonest_share": 0.3, "truncated_share": 0.0, "accuracy": 0.9}
WELL = {
    "accuracy": 0.85,
    "n": 100,
    "gap": 0.3,
    "greedy_agreement": 0.7,
    "student_entropy": 1.0,
    "teacher_entropy": 1.1,
    "empty_share": 0.0,
    "commonest_share": 0.3,
    "truncated_share": 0.0,
    "prompted": PROMPTED,
}
BASE = WELL | {"accuracy": 0.0, "gap": 3.0, "commonest_share": 0.05, "truncated_share": 1.0}


def config(**settings: object) -> TrainConfig:
    return TrainConfig(output_dir="run", context="context.md", **{"guided_share": 0.0} | settings)


def course(
    count: int,
    validations: Mapping[int, Mapping[str, Any]],
    **columns: Callable[[int], float | None],
) -> list[dict]:
    """The rows of `count` steps; those of a run that goes well, but for some columns."""
    rows: list[dict] = [{"step": 0, "validation": validations[0]}] if 0 in validations else []
    for i in range(1, count + 1):
        row = {"step": i, "loss": 1 / i, "divergence": 1 / i, "truncated_share": 0.0}
        row["learning_rate"] = min(i, 5) * 1e-6  # peaks at 5e-6
        row |= {name: column(i) for name, column in columns.items()}
        rows.append(row | ({"validation": validations[i]} if i in validations else {}))
    return rows


def raised(rows: Sequence[Mapping[str, Any]], **settings: object) -> dict[str, tuple[int, Alarm]]:
    alarms = Alarms(config(**settings))
    found = [(row["step"], alarm) for row in rows for alarm in alarms.look(row)]
    assert len({alarm.name for _, alarm in found}) == len(found), "each once"
    return {alarm.name: (step, alarm) for step, alarm in found}


def unlabelled(found: Mapping[str, Any]) -> dict[str, Any]:
    prompted = {name: x for name, x in found["prompted"].items() if name != "accuracy"}
    return {k: v for k, v in found.items() if k not in ("accuracy", "n")} | {"prompted": prompted}


def test_a_run_that_goes_well_raises_none() -> None:
    validations = {0: BASE} | dict.fromkeys(range(5, 61, 5), WELL)
    assert raised(course(60, validations)) == {}
    assert raised(course(60, {k: unlabelled(v) for k, v in validations.items()})) == {}
    assert raised(course(60, {})) == {}


def test_validations_of_versions_before_tell_nothing() -> None:
    without_n = {name: x for name, x in BASE.items() if name != "n"}
    for old in ({"accuracy": 0.0, "divergence": 0.3}, without_n):
        assert raised(course(60, dict.fromkeys(range(0, 61, 10), old))) == {}


# coverage


def stalled(*accuracies: float, every: int = 10, **more: object) -> dict[int, dict]:
    return {i * every: WELL | {"accuracy": x} | more for i, x in enumerate(accuracies)}


def test_accuracy_that_stays_while_the_loss_falls() -> None:
    step, alarm = raised(course(30, stalled(0, 0, 0, 0)))["coverage"]
    assert step == 30
    assert "accuracy 0.0% by step 0 and not above by step 30, prompted 90.0%" in alarm.evidence
    assert "guided_share 0.25" in alarm.remedy
    guided = raised(course(30, stalled(0, 0, 0, 0)), guided_share=0.25, steps=30)["coverage"][1]
    assert "higher learning_rate than 5e-06, or with more steps than 30" in guided.remedy
    # Lost again, it counts as it was at its best.
    assert "coverage" in raised(course(40, stalled(0, 0.5, 0.4, 0.5, 0.2)))
    assert "coverage" not in raised(course(40, stalled(0, 0.85, 0.4, 0.5, 0.2)))


@pytest.mark.parametrize(
    "rows",
    [
        course(30, stalled(0, 0, 0, 0.01)),
        course(29, stalled(0, 0, 0)),
        course(30, stalled(0.85, 0.85, 0.85, 0.85)),  # 85 and 90 of 100 may be chance
        course(30, stalled(0, 0, 0, 0), loss=lambda i: 1.0 if i <= 10 else 0.96),
        course(19, stalled(*[0.0] * 20, every=1)),
    ],
    ids=["rises", "two validations", "as good as prompted", "loss stays", "few steps"],
)
def test_no_alarm_of_coverage(rows: list[dict]) -> None:
    assert "coverage" not in raised(rows)


def behind(accuracy: float, p_value: float) -> dict:
    """A validation in which the prompted teacher was compared request by request."""
    apart = {"mean": PROMPTED["accuracy"] - accuracy, "p_value": p_value}
    return WELL | {"accuracy": accuracy, "behind_prompted": apart}


def test_accuracies_are_compared_request_by_request() -> None:
    """85 and 90 of 100 are not chance where five requests more are right and none is lost."""
    for at_best, p_value, expected in ((0.85, 0.01, True), (0.6, 0.06, False), (0.95, 0.01, False)):
        lost = behind(0.5, 0.001)
        found = {0: lost, 10: behind(at_best, p_value), 20: lost, 30: lost, 40: lost}
        assert ("coverage" in raised(course(40, found))) == expected


def test_frequent_validations_are_given_as_many_steps() -> None:
    assert raised(course(40, stalled(*[0.0] * 41, every=1)))["coverage"][0] == 20
    late = stalled(0, 0, 0, 0, *[0.1] * 5, every=5)  # has not moved since step 20
    assert raised(course(40, late))["coverage"][0] == 40


def gaps(*found: float) -> dict[int, dict]:
    return {i * 10: unlabelled(WELL | {"gap": gap}) for i, gap in enumerate(found)}


def test_a_gap_that_stays_where_there_are_no_labels() -> None:
    step, alarm = raised(course(30, gaps(3.0, 3.1, 2.9, 2.9)))["coverage"]
    assert step == 30
    assert "2.90 nats a token less likely to the student after step 30, 3.00" in alarm.evidence
    for found in ((3.0, 3.1, 2.9, 2.8), (3.0, 1.4, 1.4, 1.4, 1.4), (0.09, 0.09, 0.09, 0.09)):
        assert raised(course(40, gaps(*found))) == {}


def test_with_labels_accuracy_counts_and_not_the_gap() -> None:
    """A gap that closes does not help where nothing is right."""
    closing = {i * 10: WELL | {"accuracy": 0.0, "gap": 3.0 - i / 2} for i in range(4)}
    assert "coverage" in raised(course(30, closing))


# entropy


def entropies(*pairs: tuple[float, float]) -> dict[int, dict]:
    return {
        i * 10: WELL | {"student_entropy": student, "teacher_entropy": teacher}
        for i, (student, teacher) in enumerate(pairs, 1)
    }


def test_a_student_far_more_certain_than_its_teacher() -> None:
    step, alarm = raised(course(30, entropies((0.9, 1), (0.2, 1), (0.24, 1))))["entropy"]
    assert step == 30
    assert "entropy 0.240 nats a token on its own completions, the teacher's" in alarm.evidence
    assert "lower learning_rate than 5e-06 and forward_share 0.5" in alarm.remedy
    again = raised(course(20, entropies((0.2, 1), (0.2, 1))), forward_share=0.5)["entropy"][1]
    assert "forward_share" not in again.remedy


@pytest.mark.parametrize(
    "pairs",
    [
        [(0.2, 1), (0.26, 1), (0.2, 1)],
        [(0.01, 0.19), (0.01, 0.19)],
        [(0.2, 1)],
    ],
    ids=["not twice in a row", "labels", "once"],
)
def test_no_alarm_of_entropy(pairs: list[tuple[float, float]]) -> None:
    assert "entropy" not in raised(course(30, entropies(*pairs)))


# length


def test_completions_that_run_into_the_limit() -> None:
    rows = course(20, {0: BASE}, truncated_share=lambda i: 1.0)
    step, alarm = raised(rows, max_completion_tokens=48)["length"]
    assert step == 20
    assert "100% cut at 48 tokens in the last 10 steps, 100% in those before" in alarm.evidence
    assert "guided_share 0.25" in alarm.remedy
    grows = course(40, {0: BASE}, truncated_share=lambda i: 0.0 if i < 31 else 0.55)
    assert raised(grows)["length"][0] == 40
    # Three quarters of the completions are the student's own.
    guided = raised(course(20, {0: BASE}, truncated_share=lambda i: 0.375), guided_share=0.25)
    assert "50% cut" in guided["length"][1].evidence
    assert "lower learning_rate" in guided["length"][1].remedy


@pytest.mark.parametrize(
    ("rows", "guided"),
    [
        # Labels: every answer is cut at first, and none ten steps later.
        (course(40, {0: BASE}, truncated_share=lambda i: max(0.0, 1 - i / 12)), 0),
        (course(40, {0: BASE}, truncated_share=lambda i: 0.5**i**0.1), 0),
        (course(40, {0: BASE}, truncated_share=lambda i: 0.49), 0),
        (course(40, {0: BASE}, truncated_share=lambda i: 0.36), 0.25),
        (course(40, {0: BASE}, truncated_share=lambda i: 1.0), 1),
        (course(40, {}, truncated_share=lambda i: 1.0), 0),
    ],
    ids=["labels", "falls", "half", "half of its own", "the teacher's own", "no validation"],
)
def test_no_alarm_of_length(rows: list[dict], guided: float) -> None:
    assert "length" not in raised(rows, guided_share=guided)


def test_a_limit_that_the_prompted_teacher_runs_into_is_the_prompts() -> None:
    cut = WELL | {"prompted": PROMPTED | {"truncated_share": 0.5}}
    found = raised(course(40, {0: cut}, truncated_share=lambda i: 0.99), max_completion_tokens=9)
    assert list(found) == ["prompt"]
    assert found["prompt"][1].evidence == "50% at 9 tokens"
    assert "raise max_completion_tokens" in found["prompt"][1].remedy


# empty, constant


def test_empty_answers() -> None:
    nothing = WELL | {"empty_share": 0.21}
    step, alarm = raised(course(20, {0: BASE, 10: WELL, 20: nothing}))["empty"]
    assert step == 20
    assert alarm.evidence == "21% empty after step 20, prompted 0%"
    for found in (
        WELL | {"empty_share": 0.2},
        nothing | {"prompted": PROMPTED | {"empty_share": 0.1}},
    ):
        assert "empty" not in raised(course(20, {0: BASE, 20: found}))
    before = {0: BASE | {"empty_share": 0.21}, 20: WELL}
    assert raised(course(20, before)) == {}, "nothing is trained by then"


def test_one_answer_for_everything() -> None:
    same = WELL | {"commonest_share": 0.95}
    step, alarm = raised(course(30, {0: BASE, 10: WELL, 20: same, 30: same}))["constant"]
    assert step == 30
    assert alarm.evidence == "95% the same after step 30, prompted 30%"
    often = {0: BASE} | {i: WELL if i < 15 else same for i in range(1, 31)}
    assert raised(course(30, often))["constant"][0] == 25, "ten steps, however often it is seen"
    for passing in ({0: BASE, 10: same, 20: WELL, 30: same}, {0: BASE, 10: same}):
        assert "constant" not in raised(course(40, passing))
    rare = same | {"prompted": PROMPTED | {"commonest_share": 0.8}}  # most are refused
    varied = WELL | {"commonest_share": 0.94}
    for found in (rare, varied):
        assert "constant" not in raised(course(30, {0: BASE, 10: found, 20: found, 30: found}))


# divergence


def test_a_divergence_that_rises_and_stays() -> None:
    rows = course(30, {}, divergence=lambda i: 0.1 if i <= 20 else 0.51)
    step, alarm = raised(rows)["divergence"]
    assert step == 30
    assert "0.51 to 0.51 nats a token in steps 21 to 30, the median before" in alarm.evidence
    assert "lower learning_rate than 5e-06" in alarm.remedy
    early = course(20, {}, divergence=lambda i: 0.1 if i <= 10 else 0.51)
    assert raised(early)["divergence"][0] == 20


@pytest.mark.parametrize(
    "divergence",
    [
        lambda i: 0.1 if i <= 20 or i == 26 else 0.6,
        lambda i: 0.1 if i <= 20 else 0.49,
        lambda i: 0.01 if i <= 20 else 0.09,
    ],
    ids=["comes back", "less than five times", "small"],
)
def test_no_alarm_of_divergence(divergence: Callable[[int], float]) -> None:
    assert "divergence" not in raised(course(31, {}, divergence=divergence))


def test_steps_without_completions_of_the_students_own_do_not_count() -> None:
    """Every second one has guided completions alone: it is ten of the others in a row."""
    high = course(60, {}, divergence=lambda i: None if i % 2 else 0.1 if i <= 40 else 0.51)
    assert raised(high)["divergence"][0] == 60
    back = course(61, {}, divergence=lambda i: None if i % 2 else 0.1 if i <= 40 or i == 50 else 1)
    assert "divergence" not in raised(back)
    alone = course(20, {}, divergence=lambda i: None, guided_loss=lambda i: 0.1 if i <= 10 else 0.6)
    assert raised(alone)["divergence"][0] == 20


def test_a_spike_is_no_alarm_and_is_kept() -> None:
    alarms = Alarms(config())
    for row in course(30, {}, divergence=lambda i: 0.1 if i != 25 else 2.0):
        assert alarms.look(row) == []
    (spike,) = alarms.spikes
    assert spike == (25, 2.0, 0.1)


# prompt


def test_a_context_that_helps_nobody() -> None:
    base = WELL | {"accuracy": 0.6, "n": 40, "prompted": PROMPTED | {"accuracy": 0.65}}
    step, alarm = raised([{"step": 0, "validation": base}])["prompt"]
    assert step == 0
    assert alarm.evidence == "accuracy 60.0% without it, 65.0% with it, of 40"
    better = base | {"prompted": PROMPTED | {"accuracy": 0.95}}
    for found in (better, unlabelled(base), base | {"n": 4000}):
        assert raised([{"step": 0, "validation": found}]) == {}
    helps = base | {"behind_prompted": {"mean": 0.05, "p_value": 0.03}}
    assert raised([{"step": 0, "validation": helps}]) == {}
    chance = better | {"behind_prompted": {"mean": 0.35, "p_value": 0.06}}
    assert "prompt" in raised([{"step": 0, "validation": chance}])
    # Later on the student is no base.
    assert "prompt" not in raised(course(10, {10: base}))


def test_a_prompted_teacher_that_says_nothing() -> None:
    base = WELL | {"prompted": PROMPTED | {"empty_share": 0.5}}
    assert raised([{"step": 0, "validation": base}])["prompt"][1].evidence == "50%"


# a run that goes on


def test_a_resumed_run_raises_what_an_uninterrupted_one_does() -> None:
    same = WELL | {"commonest_share": 0.95}
    rows = course(
        40,
        {0: BASE, 10: BASE | {"truncated_share": 1}, 20: same, 30: same, 40: same},
        divergence=lambda i: 0.1 if i <= 25 else 0.9,
        truncated_share=lambda i: 1.0,
    )
    whole = [(step, name) for name, (step, _) in raised(rows).items()]
    assert len(whole) == 3
    for cut in range(len(rows)):
        kept = []
        for part in (rows[:cut], rows[cut:]):
            alarms = Alarms.from_rows(config(), kept)
            for row in part:
                found = {alarm.name: str(alarm) for alarm in alarms.look(row)}
                kept.append(row | ({"alarms": found} if found else {}))
        assert [(row["step"], name) for row in kept for name in row.get("alarms", ())] == whole
        assert alarms.spikes == Alarms.from_rows(config(), rows).spikes


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_runs_of_the_examples(run: dict) -> None:
    """What each came to is known: it raises that, and when."""
    found = raised(run_rows(run), **run["settings"])
    assert {name: step for name, (step, _) in found.items()} == run["alarms"]


def run_rows(run: dict) -> list[dict]:
    columns = run["steps"]
    validations = {row["step"]: row for row in run["validations"]}
    count = len(columns["loss"])
    return course(count, validations, **{k: lambda i, v=v: v[i - 1] for k, v in columns.items()})


@pytest.mark.parametrize(("on_alarm", "why"), [("warn", None), ("stop", "alarm divergence")])
def test_an_alarm_warns_unless_it_is_told_to_stop(on_alarm: str, why: str | None) -> None:
    ours, said = config(on_alarm=on_alarm), Said()
    alarms = Alarms(ours)
    rows = course(32, {}, divergence=lambda i: 0.1 if i <= 20 else 0.51)
    ends = [_raise_alarms(alarms, row, ours, said) for row in rows]
    assert ends == [*[None] * 29, why, None, None]
    (kept,) = [row["alarms"] for row in rows if "alarms" in row]
    assert said.lines == [f"alarm     {kept['divergence']}"]


class Said(Progress):
    """What a run tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


# real runs of the tiny model


def train(settings: dict, *arguments: str) -> int:
    path = Path(settings["output_dir"]).parent / "config.yaml"
    path.write_text(in_groups(settings))
    return main(["train", "--config", str(path), *arguments])


def alarms_in(settings: dict) -> dict[int, dict[str, str]]:
    """The alarms of each step of a run that had any."""
    rows = read_metrics(Path(settings["output_dir"]) / "metrics.jsonl")
    return {row["step"]: row["alarms"] for row in rows if "alarms" in row}


def test_a_rate_that_is_far_too_high(settings: dict, capsys: pytest.CaptureFixture) -> None:
    """Calm steps, then 300 times the rate: saved, with a status of its own; it can go on."""
    settings |= {"steps": 12, "validation_data": None, "on_alarm": "stop"}
    assert train(settings) == 0
    assert "alarm" not in capsys.readouterr().out
    higher = ("--resume", "--steps=30", "--learning_rate=1")
    assert train(settings, *higher) == 3
    printed = capsys.readouterr().out
    ((step, raised_then),) = alarms_in(settings).items()
    assert list(raised_then) == ["divergence"]
    assert f"\nalarm     {raised_then['divergence']}\n" in printed
    assert f"stopped by alarm divergence after step {step}; checkpoint saved" in printed
    assert step < 30
    (checkpoint,) = list_checkpoints(Path(settings["output_dir"]) / "checkpoints")[-1:]
    assert checkpoint.name == f"step-{step:06d}"

    assert train(settings, *higher) == 0
    printed = capsys.readouterr().out
    assert f"  alarm        step {step}, {raised_then['divergence']}\n" in printed
    assert "\nalarm     " not in printed, "once"
    assert list(alarms_in(settings)) == [step]
    report = (Path(settings["output_dir"]) / "report.md").read_text()
    assert f"## Alarms\n\n- step {step}, {raised_then['divergence']}\n" in report
    assert report.index("- divergence that stood out, nats a token: ") < report.index(
        "## Scorecard"
    )


def test_python_is_told_which_alarm_and_goes_on_all_the_same(
    settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it stopped before the first step: what was measured and said then stays."""
    helps_nobody = BASE | {"prompted": PROMPTED | {"accuracy": 0.0}}
    measured = [helps_nobody, WELL]
    monkeypatch.setattr("opcd.training.validation.Validation.measure", lambda _: measured.pop(0))
    names = ("context", "prompts", "validation_data", "model")
    given = {name: Path(settings.pop(name)) for name in names} | settings
    given |= {"steps": 2, "validate_every": 2, "on_alarm": "stop", "test_data": None}
    with pytest.raises(opcd.Stopped, match="stopped by alarm prompt after step 0") as stopped:
        opcd.distill(**given, quiet=True)
    assert stopped.value.why == "alarm prompt"
    assert stopped.value.folder == Path(settings["output_dir"])
    with contextlib.suppress(opcd.Stopped):  # a KeyboardInterrupt, at which pytest would end
        opcd.distill(**given, quiet=True, resume=True)
    rows = read_metrics(Path(settings["output_dir"]) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert {step: [*names] for step, names in alarms_in(settings).items()} == {0: ["prompt"]}
