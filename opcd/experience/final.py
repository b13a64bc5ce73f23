"""The final test: base and distilled models on problems that nothing was chosen by, once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd.experience.folder import LAST, kept
from opcd.experience.measuring import Measured, agreement
from opcd.experience.phases import Phases, Round
from opcd.training.loop import Diverged

COLUMNS = {
    "base": "the model before",
    "base_experienced": "before, with what it wrote down first",
    "distilled": "after the last accepted round",
    "off_policy": "the same contexts, distilled on the prompted model's own completions",
    "distilled_experienced": "after, with the last accepted experience",
}


def final_columns(rounds: Sequence[Round], phases: Phases) -> dict[str, Any]:
    """What each model reaches, by its name in COLUMNS; what is to be trained comes first."""
    accepted = [one for one in rounds if one.decision.accepted]
    tried = [one for one in rounds if one.contexts]
    base = phases.config.model
    models: dict[str, tuple[str, Path | None]] = {"base": (base, None)}
    if tried and (first := (accepted or tried)[0]).began == base:
        models["base_experienced"] = base, first.contexts[0]
    if accepted:
        last = accepted[-1]
        models["distilled"] = last.weights.name, None
        models["distilled_experienced"] = last.weights.name, last.contexts[0]
        if phases.experience.off_policy and (name := _off_policy(accepted, phases)):
            models["off_policy"] = name, None
    (phases.folder / LAST).mkdir(exist_ok=True)
    return {name: _column(name, *models[name], phases) for name in COLUMNS if name in models}


def _column(name: str, model: str, context: Path | None, phases: Phases) -> dict[str, Any]:
    """One model, alone or behind a context; elsewhere it is asked alone."""
    bench, problems = phases.bench, phases.parts.test
    requests = bench.requests("test", problems)

    def measure() -> dict[str, Any]:
        found = bench.measure(model, requests, problems, context)
        elsewhere = bench.elsewhere(model, phases.validation) if context is None else []
        return {"test": found._asdict(), "elsewhere": elsewhere}

    found = kept(phases.folder / LAST / f"{name}.json", measure)
    test, said = Measured(**found["test"]), found["elsewhere"]
    same = agreement(said, phases.original_elsewhere).summary(share=True) if said else None
    return {"meaning": COLUMNS[name], **test.summary(), "values": test.values, "elsewhere": same}


def _off_policy(accepted: Sequence[Round], phases: Phases) -> str | None:
    """The accepted rounds again, each on its prompted model's completions alone.

    Their teachers are those of the rounds. None where training diverged.
    """
    model = phases.config.model
    for one in accepted:
        run = phases.folder / f"round-{one.number}" / "off_policy"
        teacher = one.began if one.began != model else None
        # Remedies have no place there: nothing is the student's own, and a replayed prompt's target
        # would be a teacher of its own.
        changed = {"guided_share": 1.0, "teacher": teacher, "return_anchor": 0.0}
        changed |= {"replay_share": 0.0, "replay_data": None}
        changed["prompts_per_step"] = phases.config.of_task().prompts_per_step or 1
        try:
            phases.distilling.run(one.number, model, one.contexts, run, **changed)
        except Diverged as error:
            phases.say(f"off-policy training diverged: {error}")
            return None
        model = str(run / "final")
    return model
