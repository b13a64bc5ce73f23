"""Many runs side by side: their scorecards as a table, and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.evaluation.evaluate import read_scorecard
from opcd.evaluation.figure import blank_figure
from opcd.evaluation.report import aligned
from opcd.evaluation.verdict import reference_of

INK, QUIET, OURS, THEIRS = "#33312c", "#b9b4a8", "#1f6f5c", "#b3401f"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "opcd", "font.size": 8, "text.color": INK}
NOTHING = "–"


class Scored(NamedTuple):
    """A scorecard, and what it is called beside the others."""

    name: str
    card: dict[str, Any]

    @property
    def judged(self) -> bool:
        """Whether answers are right or wrong, and not only as the prompted model's."""
        return "accuracy" in self.card["contenders"]["base"]

    def reached(self, contender: str) -> tuple[float, list[float]] | None:
        """A contender's accuracy with its interval, or its agreement; None where it has none."""
        column = self.card["contenders"].get(contender)
        if column is None:
            return None
        if self.judged:
            return column["accuracy"], column["accuracy_interval_95"]
        return column["greedy_agreement"]["mean"], column["greedy_agreement"]["interval_95"]


def compare(folders: Sequence[Path]) -> list[Scored]:
    """The scorecards of folders, each named by the parts of its path in which they differ.

    Raises InputError for a folder without one, for the same folder twice, and where some of the
    scorecards judge answers and others do not.
    """
    cards = [read_scorecard(folder) for folder in folders]
    lacking = [str(f) for f, card in zip(folders, cards, strict=True) if not _is_whole(card)]
    if lacking:
        raise InputError(
            f"each folder must hold a scorecard.json of opcd, got none in {', '.join(lacking)}; "
            f"name output_dirs of runs that have ended, or folders of `opcd eval`"
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("each folder must be named once, got one twice; leave it out")
    found = [Scored(n, c or {}) for n, c in zip(_names(folders), cards, strict=True)]
    if len({run.judged for run in found}) > 1:
        unjudged = ", ".join(run.name for run in found if not run.judged)
        raise InputError(
            f"scorecards must all judge answers, or none of them, got {unjudged} without accepted "
            f"answers beside others; compare those apart"
        )
    return found


def comparison_table(runs: Sequence[Scored]) -> str:
    """A line a run; below it what must be known before two lines are compared."""
    what = "accuracy" if runs[0].judged else "agrees"
    rows: list[tuple[str, ...]] = [
        ("", "base", "prompted", "distilled", "95 % interval", "balanced", "harm", "elsewhere", "n")
    ]
    for run in runs:
        columns, card = run.card["contenders"], run.card
        distilled = columns.get("distilled", {})
        interval = run.reached("distilled")
        harm = columns.get("distilled_prompted", {}).get("harm")
        rows.append(
            (
                run.name,
                *(_share(run.reached(who)) for who in ("base", reference_of(columns), "distilled")),
                "{:.1%} – {:.1%}".format(*interval[1]) if interval else NOTHING,
                _percent(distilled.get("balanced_accuracy")),
                _percent(harm["mean"] if harm else None),
                _percent(card.get("elsewhere", {}).get("agreement", {}).get("mean")),
                str(columns["base"]["n"]),
            )
        )
    legend = (
        f"{what}; harm: right without the prompt, wrong with it; elsewhere: answers on other "
        f"requests that are still the original model's"
    )
    return "\n".join([aligned(rows, texts=1), "", legend, *_cautions(runs)])


def draw_comparison(runs: Sequence[Scored], file: Path) -> None:
    """A line a run: base, prompted and distilled with their 95 % intervals; as an SVG."""
    import matplotlib as mpl
    from matplotlib.ticker import PercentFormatter

    marks = {"base": ("o", QUIET, -0.22), "prompted": ("s", THEIRS, 0.0)}
    marks["distilled"] = ("D", OURS, 0.22)
    with mpl.rc_context(STYLE):
        figure = blank_figure((7.5, 1.2 + 0.42 * len(runs)), layout="constrained")
        axes = figure.subplots()
        for who, (mark, colour, shift) in marks.items():
            named = False
            for line, run in enumerate(runs):
                name = reference_of(run.card["contenders"]) if who == "prompted" else who
                found = run.reached(name)
                if found is None:
                    continue
                share, (low, high) = found
                axes.errorbar(
                    share,
                    line + shift,
                    xerr=[[max(share - low, 0)], [max(high - share, 0)]],
                    fmt=mark,
                    color=colour,
                    markersize=5,
                    capsize=2,
                    label=None if named else who,
                )
                named = True
        axes.set_yticks(range(len(runs)), [run.name for run in runs])
        axes.set(
            ylim=(len(runs) - 0.5, -0.5),
            xlim=(-0.02, 1.02),
            title="accuracy" if runs[0].judged else "answers that are the prompted model's",
        )
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="x", color=QUIET, alpha=0.4, linewidth=0.5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(file, metadata={"Date": None}, facecolor="white")


def _is_whole(card: dict[str, Any] | None) -> bool:
    """Whether a file holds what lines are made of: somebody else may have written it."""
    try:
        columns, _ = (card or {})["contenders"], (card or {})["measured_by"].get
        run = Scored("", card or {})
        reached = [run.reached(who) for who in ("base", reference_of(columns), "distilled")]
        numbers = [x for found in reached if found for x in (found[0], *found[1])]
        return reached[0] is not None and sum(numbers) >= 0 and columns["base"]["n"] > 0
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def _cautions(runs: Sequence[Scored]) -> list[str]:
    """Where lines are of other requests, models or scorers than the first one's."""
    lines = []
    first = runs[0].card["measured_by"]
    for what in ("form", "test_data", "model", "teacher", "scorer", "elsewhere_data", "decoding"):
        found = [(run.name, run.card["measured_by"].get(what, first.get(what))) for run in runs]
        other = [name for name, value in found if value != first.get(what, value)]
        if other:
            called = "context, or form of prompts," if what == "form" else what
            lines.append(f"other {called} than the first: {', '.join(other)}")
    return lines


def _names(folders: Sequence[Path]) -> list[str]:
    """Paths without what all of them begin with; one alone keeps its last part."""
    parts = [folder.resolve().parts for folder in folders]
    begin = 0
    while all(len(p) > begin + 1 for p in parts) and len({p[begin] for p in parts}) == 1:
        begin += 1
    return ["/".join(p[begin:]) for p in parts]


def _share(found: tuple[float, list[float]] | None) -> str:
    return _percent(found[0] if found else None)


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.1%}"
