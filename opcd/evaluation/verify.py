"""A run held against its evidence: every file's digest, and the scorecard made again."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opcd.config import TrainConfig
from opcd.episodes import Prompt
from opcd.errors import InputError
from opcd.evaluation.agreement import Divergences, Gap
from opcd.evaluation.contenders import Answer, Contender
from opcd.evaluation.elsewhere import figures_in, means_of
from opcd.evaluation.evaluate import agreement_of, reached
from opcd.evaluation.evidence import (
    CARD,
    FILE,
    FINAL,
    FORMAT,
    OUTPUTS,
    comparable_settings,
    input_files,
    tree_digests,
)
from opcd.evaluation.intervals import PerRequest
from opcd.evaluation.measured import test_digest
from opcd.evaluation.observed import CONTENDERS
from opcd.evaluation.verdict import Verdict, reference_of, verdict
from opcd.models.digest import file_digests, local_folder
from opcd.runtime.environment import code_digest
from opcd.runtime.files import file_digest, read_jsonl
from opcd.runtime.strict_json import parse_json
from opcd.scoring.scorers import Scorer, load_scorer
from opcd.tasks.data import Example
from opcd.tasks.task import Case

AGREES, DIFFERS, UNKNOWN = "agrees", "DIFFERS", "not checked"
SHOWN = 4  # figures, or files, of a line
# What files hold that a stranger wrote may be anything: other kinds, other keys, no rows.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class Check(NamedTuple):
    """One thing that was held against another."""

    state: str  # one of AGREES, DIFFERS, UNKNOWN
    what: str

    def __str__(self) -> str:
        return f"{self.state:<12} {self.what}"


class Verified(NamedTuple):
    """All of them, and what tells this evidence from any other."""

    checks: list[Check]
    evidence_sha256: str
    verdict: str  # the scorecard's; "" where there is none

    @property
    def agrees(self) -> bool:
        """Whether nothing differs; what could not be looked at does not count."""
        return all(check.state != DIFFERS for check in self.checks)

    @property
    def lines(self) -> list[str]:
        """For people."""
        states = [check.state for check in self.checks]
        unknown = f"; {n} could not be checked here" if (n := states.count(UNKNOWN)) else ""
        found = (
            f"nothing differs{unknown}"
            if self.agrees
            else f"{states.count(DIFFERS)} of {len(states)} do not agree{unknown}"
        )
        return [
            *map(str, self.checks),
            f"evidence     sha256 {self.evidence_sha256}: nobody has signed it, so hold this "
            f"against what you were told",
            *([f"scorecard    {self.verdict}"] if self.verdict else []),
            f"verified     {found}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "agrees": self.agrees,
            "checks": [check._asdict() for check in self.checks],
            "evidence_sha256": self.evidence_sha256,
        }


def verify(run: Path, config: TrainConfig) -> Verified:
    """Hold a run's folder against its evidence.json.

    config: as the folder's config.yaml has it; its scorer judges the answers again.
    Neither models are loaded nor anything is fetched. Raises InputError where there is no evidence,
    or none that opcd wrote. The folder must have passed `check_run_folder`.
    """
    evidence = _read_object(run / FILE, "`opcd eval` writes it")
    if evidence.get("format") != FORMAT:
        raise InputError(
            f"{run / FILE} must have format {FORMAT}, got {str(evidence.get('format'))[:20]!r}; "
            f"verify it with the version of opcd that wrote it"
        )
    try:
        checks = [
            *_outputs(run, evidence["outputs"]),
            *_weights(run, evidence["weights"]),
            *_inputs(config, evidence["inputs"]),
            _settings(config, evidence["settings"]),
            _code(evidence["made_by"]),
        ]
    except _MALFORMED as error:
        raise InputError(
            f"{run / FILE} must be as opcd writes it, got {type(error).__name__}: {error}; score "
            f"the run again with opcd eval"
        ) from error
    found = ""
    if (run / CARD).is_file():
        card = _read_object(run / CARD, "score the run again with opcd eval")
        checks += _figures(run, card, config, evidence)
        found = _word(card)
    return Verified(checks, file_digest(run / FILE), found)


def _word(card: Mapping[str, Any]) -> str:
    try:
        return str(Verdict(**card["verdict"])) if "verdict" in card else ""
    except _MALFORMED:
        return ""


def _read_object(file: Path, advice: str) -> dict[str, Any]:
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = "it is not there" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{file} must be a JSON object, got none: {reason}; {advice}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} must be a JSON object, got {type(found).__name__}; {advice}")
    return found


def _outputs(run: Path, digests: Mapping[str, str]) -> list[Check]:
    there = {name: file_digest(run / name) for name in (*OUTPUTS, CARD) if (run / name).is_file()}
    return [_same_files("the files of the run", digests, there)]


def _weights(run: Path, weights: Mapping[str, Any]) -> list[Check]:
    checks = []
    for what, role in (("in", "the model before"), ("teacher", "the teacher")):
        if (model := weights[what]) is not None:
            checks.append(_model(f"{role}, {model['name']}", model))
    out, own = weights["out"], run / FINAL
    if own.is_dir():
        digests = out["files"] if out is not None and out["name"] == FINAL else {}
        checks.append(_same_files("the distilled model, final/", digests, tree_digests(own)))
    elif out is not None and out["name"] == FINAL:
        checks.append(Check(DIFFERS, "the distilled model: final/ is not there"))
    elif out is not None:
        checks.append(_model(f"the distilled model, {out['name']}", out))
    return checks


def _model(what: str, model: Mapping[str, Any]) -> Check:
    folder = local_folder(model["name"])
    if folder is None or model["files"] is None:
        return Check(UNKNOWN, f"{what}: it is not here, or was not when it was named")
    return _same_files(what, model["files"], file_digests(folder))


def _inputs(config: TrainConfig, inputs: Mapping[str, Any]) -> list[Check]:
    """Context and data, where this configuration finds them."""
    checks = []
    files = input_files(config)
    for name in sorted({*files, *inputs}):
        file, digest = files.get(name), (inputs.get(name) or {}).get("sha256")
        if file is None or not Path(file).is_file() or digest is None:
            checks.append(Check(UNKNOWN, f"{name}: its file is not here, or was not then"))
        else:
            same = file_digest(Path(file)) == digest
            checks.append(Check(AGREES if same else DIFFERS, f"{name}: {file}"))
    return checks


def _settings(config: TrainConfig, settings: Mapping[str, Any]) -> Check:
    now = comparable_settings(config)
    before = {name: settings.get(name) for name in now}
    for name in ("without_context", "stop"):
        if isinstance(before[name], dict):  # left out of what is shown
            before[name] = now[name]
    resolved = {"device", "dtype", "today"}  # which the run itself finds
    other = [name for name in now if now[name] != before[name] and name not in resolved]
    if other:
        return Check(DIFFERS, f"the settings in config.yaml: {', '.join(other)}")
    return Check(AGREES, "the settings in config.yaml")


def _code(made_by: Mapping[str, Any]) -> Check:
    """Another version may say the same, so it is no fault."""
    if made_by["code_sha256"] == code_digest():
        return Check(AGREES, "the code: the same here")
    return Check(UNKNOWN, f"the code: {str(made_by['opcd'])[:40]} made it, other code is here")


def _same_files(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> Check:
    found = {
        "is another": [name for name in before if name in now and before[name] != now[name]],
        "is gone": [name for name in before if name not in now],
        "was added": [name for name in now if name not in before],
    }
    told = [f"{name} {how}" for how, names in found.items() for name in names]
    if told:
        more = f" and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
        return Check(DIFFERS, f"{what}: {', '.join(told[:SHOWN])}{more}")
    return Check(AGREES, f"{what}: {len(now)} files")


def _figures(
    run: Path, card: dict[str, Any], config: TrainConfig, evidence: Mapping[str, Any]
) -> list[Check]:
    """The scorecard's figures against those that the answers give."""
    rows, elsewhere = (read_jsonl(run / name) for name in ("answers.jsonl", "elsewhere.jsonl"))
    scorer = load_scorer(config.scorer)
    try:
        again = recomputed(card, rows, elsewhere, scorer, config.shown_share)
        other = _other_rows(again.rows, rows)
        measured = card["measured_by"]
        asked = _requests(rows)
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        return [Check(DIFFERS, f"the scorecard: answers that opcd does not write ({reason:.100})")]
    checks = [
        Check(DIFFERS, f"the scorer: {scorer.spec} is not what the scorecard was judged by")
        if measured["scorer"] != scorer.identity
        else Check(AGREES, f"the scorer: {scorer.spec}"),
        Check(DIFFERS, "the test data: other requests or accepted answers than were measured on")
        if measured["test_data"] != test_digest(asked)
        else Check(AGREES, f"the test data: {len(rows)} requests with their accepted answers"),
    ]
    if measured != evidence["measured_by"]:
        checks.append(Check(DIFFERS, "what scorecard and evidence say they were measured by"))
    if other:
        checks.append(Check(DIFFERS, f"answers.jsonl: {'; '.join(other[:SHOWN])}"))
    figures = [line for key in again.card for line in _differing(key, card.get(key), again[0][key])]
    if figures:
        more = f" and {len(figures) - SHOWN} more" if len(figures) > SHOWN else ""
        checks.append(Check(DIFFERS, f"the scorecard: {'; '.join(figures[:SHOWN])}{more}"))
    else:
        checks.append(Check(AGREES, f"the scorecard: every figure, from {len(rows)} answers again"))
    if kept := [part for part in ("test_sets", "leak", "elsewhere_tasks") if part in card]:
        checks.append(Check(UNKNOWN, f"the scorecard's {', '.join(kept)}: their files, no more"))
    return checks


class Again(NamedTuple):
    """What the answers give."""

    card: dict[str, Any]  # the parts of a scorecard that come from them
    rows: list[dict[str, Any]]


def recomputed(
    card: Mapping[str, Any],  # for what answers do not tell: who the contenders are
    rows: Sequence[Mapping[str, Any]],  # of answers.jsonl
    elsewhere: Sequence[Mapping[str, Any]],  # of elsewhere.jsonl
    scorer: Scorer,
    guided_share: float,
) -> Again:
    """The scorecard from the answers alone."""
    names = [name for name in rows[0] if f"{name}_tokens" in rows[0]]
    answers = {name: [_answer(row, name) for row in rows] for name in names}
    said = answers[reference_of(answers)]
    meanings = {name: column["meaning"] for name, column in card["contenders"].items()}
    contenders = [
        Contender(name, meanings.get(name, ""), lambda _: [], _without(name)) for name in names
    ]
    examples = [
        Example(messages, answers, f"answers.jsonl:{i}", context)
        for i, (messages, answers, context) in enumerate(_requests(rows), start=1)
    ]
    cases = [Case(example, Prompt([], [])) for example in examples]
    measured = [(when, alone) for when, (alone, _) in CONTENDERS.items() if alone in names]
    sides = {when: _nats(rows, alone) for when, alone in measured}
    gaps = {when: gap for when, (gap, _) in sides.items()}
    apart = {when: both for when, (_, both) in sides.items()}
    reached_again, judged = reached(contenders, answers, said, cases, scorer, gaps)
    columns = reached_again["contenders"]
    for when, alone in measured:
        columns[alone] |= agreement_of(gaps[when], apart[when])
    found: dict[str, Any] = {
        **reached_again,
        "divergence": {
            **{w: apart[w].reverse_kl.mean if w in apart else None for w in CONTENDERS},
            "unit": card["divergence"]["unit"],
            "prompts": len(gaps["before"].missed),
        },
    }
    if elsewhere or "elsewhere" in card:
        kinds = [row.get("kind", "") for row in elsewhere]
        found["elsewhere"] = card.get("elsewhere", {}) | means_of(figures_in(elsewhere), kinds)
    if "distilled" in columns:
        found["verdict"] = verdict({**card, **found}, guided_share)._asdict()
    return Again(found, judged)


def _without(name: str) -> str:
    """The contender that is the same model without the context, if this is one with it."""
    of_a_run = {both: alone for alone, both in CONTENDERS.values()}
    return of_a_run.get(name) or (
        name.removesuffix("_prompted") if name.endswith("_prompted") else ""
    )


def _requests(
    rows: Sequence[Mapping[str, Any]],
) -> list[tuple[tuple[Any, ...], tuple[str, ...], str]]:
    """Messages, accepted answers and context's name of each row."""
    return [
        (tuple(row["prompt"]), tuple(row.get("accepted", ())), row.get("context", ""))
        for row in rows
    ]


def _answer(row: Mapping[str, Any], name: str) -> Answer:
    finish = "length" if row.get(f"{name}_cut") else "stop"
    # Which tokens they were is not kept; how many is all that a scorecard tells.
    return Answer(row[name], [0] * row[f"{name}_tokens"], finish, row.get(f"{name}_raw", row[name]))


def _nats(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Gap, Divergences]:
    """A student's distance from its teacher on the requests that it was measured on."""
    found = [row[f"{name}_nats"] for row in rows if f"{name}_nats" in row]
    missed = [x["missed"] for x in found]
    shown, own = [len(x) for x in missed], [x["tokens"] for x in found]
    nats = PerRequest([math.fsum(x) for x in missed], shown)
    likeliest = PerRequest([x["likeliest"] for x in found], shown)
    kl = {side: PerRequest([x[side] for x in found], own) for side in ("reverse_kl", "forward_kl")}
    entropies = [PerRequest([], [])] * 2  # of which a scorecard tells nothing
    return Gap(nats, likeliest, missed, []), Divergences(*kl.values(), *entropies)


def _other_rows(
    judged: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What rows say of an answer that the scorer does not, a text each."""
    return [
        f"line {i}: {key} {row.get(key)!r}, judged again {value!r}"
        for i, (again, row) in enumerate(zip(judged, rows, strict=True), start=1)
        for key, value in again.items()
        if key.endswith(("_right", "_rates")) and row.get(key) != value
    ]


def _differing(where: str, before: Any, now: Any) -> list[str]:
    """The places in which two values are not the same, but for the last bits of a number."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in _differing(f"{where}.{key}", before.get(key), now.get(key))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [line for i, (b, n) in pairs for line in _differing(f"{where}[{i}]", b, n)]
    both = (before, now)
    if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in both):
        same = math.isclose(before, now, rel_tol=1e-9, abs_tol=1e-12)
    else:
        same = before == now
    return [] if same else [f"{where} {_shown(before)}, from the answers {_shown(now)}"]


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
