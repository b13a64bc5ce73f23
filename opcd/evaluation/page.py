"""report.html: a run on one page, for whoever decides; no network, no script, no server."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opcd.config import TrainConfig
from opcd.config.fields import FIELDS, GROUPS
from opcd.evaluation.facts import set_lines
from opcd.evaluation.plots import Plot, accuracy_plot, position_plot, training_plots
from opcd.evaluation.report import check_lines, raised_alarms, scorecard_facts, spike_lines
from opcd.evaluation.savings import savings
from opcd.evaluation.verdict import Verdict, reference_of
from opcd.runtime.files import shown, write_text
from opcd.tasks.messages import asked

FILE = "report.html"
TEMPLATE = "page.html.jinja"
EXAMPLES, ELSEWHERE = 12, 6  # of answers side by side
LONGEST = 500  # characters of a text
SIDE_BY_SIDE = ("base", "prompted", "teacher", "distilled")
TONES = {"learned": "good", "learned in part": "fair", "nothing to learn": "none"}
TONES |= {"too few requests": "none"}
CHECKED = "most is missed at"  # behind which the check's findings quote an answer


class Record(NamedTuple):
    """What a page is of."""

    config: TrainConfig
    metrics: Sequence[Mapping[str, Any]]
    evidence: Mapping[str, Any]
    card: dict[str, Any] | None  # None: nothing was scored
    answers: Sequence[Mapping[str, Any]]
    elsewhere: Sequence[Mapping[str, Any]]


def write_page(folder: Path, record: Record) -> None:
    """Write report.html, with what else lies in the folder: the check before, and savings.

    Everything of a model or a person is escaped. With `without_texts` none of it is there.
    """
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["text"] = _clean
    written = environment.get_template(TEMPLATE).render(**_view(folder, record))
    write_text(folder / FILE, written)


def _view(folder: Path, record: Record) -> dict[str, Any]:
    """What the template shows, by the names that it has for it."""
    config, card = record.config, record.card
    texts = not config.without_texts
    trained = training_plots(record.metrics, config.forward_share)
    found: dict[str, Any] = {
        "context": Path(config.context).name,
        "model": Path(config.model).name,
        "texts": texts,
        "verdict": None,
        "tone": "none",
        "alarms": [*raised_alarms(record.metrics), *spike_lines(record.metrics)],
        "columns": {},
        "facts": [],
        "rates": [],
        "sets": [],
        "accuracy": None,
        "training": [_drawn(plot) for plot in trained],
        "position": None,
        "checked": [],
        "savings": savings(folder),
        "changes": [],
        "examples": [],
        "shown": [],
        "elsewhere": None,
        "elsewhere_examples": [],
        "settings": _settings(config),
        "versions": _versions(record.evidence),
        "digests": _digests(record.evidence),
        "made": record.evidence["made"],
    }
    if card is None:
        return found
    columns = card["contenders"]
    named = _class_names(columns, record.answers) if not texts else {}
    found |= {
        "columns": columns,
        "facts": scorecard_facts(card, texts),
        "rates": _rates(columns, named),
        "sets": [
            _set(name, of_set, record.answers, texts)
            for name, of_set in card.get("test_sets", {}).items()
        ],
        "accuracy": _drawn(accuracy_plot(columns)),
        "checked": _checked(folder, card, texts),
        "changes": _changes(columns, record.answers),
    }
    if "verdict" in card:
        verdict = Verdict(**card["verdict"])
        reason = verdict.reason
        for name in sorted(named, key=len, reverse=True):  # of the rates that were lost
            reason = reason.replace(f" {name} ", f" {named[name]} ")
        found["verdict"] = verdict._replace(reason=reason)
        found["tone"] = TONES.get(card["verdict"]["word"], "poor")
    if (plot := position_plot(_missed(record.answers))) is not None:
        found["position"] = _drawn(plot)
    if "elsewhere" in card:
        found["elsewhere"] = card["elsewhere"]
    if texts:
        found["shown"] = [name for name in SIDE_BY_SIDE if name in columns]
        found["examples"] = [
            _example(row, found["shown"]) for row in _worst(record.answers, columns)[:EXAMPLES]
        ]
        others = [row for row in record.elsewhere if not row["same"]]
        others.sort(key=lambda row: -row["reverse_kl"])
        found["elsewhere_examples"] = [
            {**row, "asked": asked(row["prompt"])} for row in others[:ELSEWHERE]
        ]
    return found


def _drawn(plot: Plot) -> dict[str, Any]:
    """A drawing is markup of our own making; what is in it was escaped by its library."""
    return {"title": plot.title, "words": plot.words, "svg": Markup(plot.svg)}


def _clean(text: Any) -> str:
    """A text of a length, without what no page can hold: controls, halves of characters."""
    text = str(text)
    text = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
    text = text.encode("utf-8", "replace").decode("utf-8")
    other = "\N{REPLACEMENT CHARACTER}"
    return "".join(c if c.isprintable() or c in "\n\t" else other for c in text)


def _worst(
    answers: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]
) -> list[Mapping[str, Any]]:
    """The worst first: what was right with the prompt and is not now; then by what is missed."""
    if "distilled" not in columns:
        return [*answers]
    reference = reference_of(dict(columns))

    def badness(row: Mapping[str, Any]) -> tuple[float, float, bool]:
        lost = row.get(f"{reference}_right", 0) - row.get("distilled_right", 0)
        missed = row.get("distilled_nats", {}).get("missed", [])
        nats = sum(missed) / len(missed) if missed else 0.0
        return -lost, -nats, row["distilled"] == row[reference]

    return sorted(answers, key=badness)


def _example(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    words = {None: "", True: "right", False: "wrong"}
    return {
        "asked": asked(row["prompt"]),
        "accepted": row.get("accepted", []),
        "context": row.get("context", ""),
        "answers": [
            {
                "name": name,
                "text": row[name],
                "mark": words[right]
                if (right := row.get(f"{name}_right")) in (None, True, False)
                else f"{right:.0%} right",
                "cut": row.get(f"{name}_cut", False),
            }
            for name in names
        ],
    }


def _changes(
    columns: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]
) -> list[tuple[str, int]]:
    """How many requests were kept, lost and gained; [] where nothing says what is right."""
    reference = reference_of(dict(columns))
    if "distilled" not in columns or "accuracy" not in columns["distilled"]:
        return []
    pairs = [(row[f"{reference}_right"], row["distilled_right"]) for row in answers]
    return [
        (f"as right as {reference}", sum(b == a > 0 for b, a in pairs)),
        (f"less right than {reference}", sum(b > a for b, a in pairs)),
        (f"more right than {reference}", sum(b < a for b, a in pairs)),
        ("neither right", sum(b == a == 0 for b, a in pairs)),
    ]


def _class_names(
    columns: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """What stands for the names of classes, which are accepted answers; {} for a scorer's rates."""
    if any(f"{name}_rates" in row for row in answers for name in columns):
        return {}
    rates = next(iter(columns.values())).get("rates", {})
    return {name: f"class {i}" for i, name in enumerate(rates, start=1)}


def _rates(columns: Mapping[str, Any], named: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each rate, under its name or what stands for that, and the contenders' means of it."""
    first = next(iter(columns.values()))
    rows = [
        {
            "name": named.get(name, name),
            "n": rate["n"],
            "means": [column["rates"][name]["mean"] for column in columns.values()],
        }
        for name, rate in first.get("rates", {}).items()
    ]
    if "balanced_accuracy" in first:
        means = [column["balanced_accuracy"] for column in columns.values()]
        rows.append({"name": "balanced", "n": None, "means": means})
    return rows


def _set(
    name: str, card: dict[str, Any], answers: Sequence[Mapping[str, Any]], texts: bool
) -> dict[str, Any]:
    """One more set of test data, as the first one is shown, and what is said of it."""
    columns = card["contenders"]
    named = _class_names(columns, answers) if not texts else {}
    rates = _rates(columns, named)
    return {"name": name, "columns": columns, "rates": rates, "lines": set_lines(card, texts)}


def _missed(answers: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Nats of each token, of the models that they were measured of."""
    found = {
        name: [row[f"{name}_nats"]["missed"] for row in answers if f"{name}_nats" in row]
        for name in ("base", "distilled")
    }
    return {name: rows for name, rows in found.items() if rows}


def _checked(folder: Path, card: Mapping[str, Any], texts: bool) -> list[tuple[str, str]]:
    """What the check before training found, a word and what it says of it."""
    found = []
    for line in check_lines(folder, card):
        line = line if texts else line.partition(f"; {CHECKED}")[0]
        word, _, said = line.partition(" ")
        found.append((word, said.strip()))
    return found


def _settings(config: TrainConfig) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Every field, in its group: name, value, and where it came from."""
    hidden = {"without_context", "stop"} if config.without_texts else set()
    return [
        (
            group,
            [
                (name, _value(name, config, hidden), config.origins.get(name, "default"))
                for name, its in FIELDS.items()
                if its == group
            ],
        )
        for group in GROUPS
    ]


def _value(name: str, config: TrainConfig, hidden: set[str]) -> str:
    value = getattr(config, name)
    if name in hidden and value and value not in ("default", "none"):
        return "a text"
    if value is None:
        return "–"
    return shown(value) if isinstance(value, str) else str(value)


def _versions(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    made = evidence["made_by"]
    return [
        ("opcd", made["opcd"]),
        ("python", made["python"]),
        *made["packages"].items(),
        ("device", made["device"]),
        ("threads", str(made["threads"])),
        ("platform", made["platform"]),
        ("seed", str(evidence["seeds"]["run"])),
    ]


def _digests(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What tells apart code, inputs and weights; every file's own is in evidence.json."""
    weights = evidence["weights"]
    found = [("code", evidence["made_by"]["code_sha256"])]
    found += [(name, its["sha256"] or "not there") for name, its in evidence["inputs"].items()]
    for what, name in (("in", "before"), ("out", "after")):
        files = (weights[what] or {}).get("files") or {}
        found += [
            (f"{file}, {name}", digest)
            for file, digest in files.items()
            if file.endswith((".safetensors", ".bin"))
        ]
    return found
