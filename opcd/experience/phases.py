"""The phases of one round, and what comes of them; each result is a file of the round's folder."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.evaluation.intervals import PerRequest
from opcd.experience.attempts import Attempt, read_attempts, summary
from opcd.experience.contexts import (
    Candidate,
    context_tokens,
    items_candidates,
    success_candidates,
)
from opcd.experience.distilling import Distilling
from opcd.experience.exercises import sampled_attempts
from opcd.experience.filtering import ranked, scored
from opcd.experience.folder import ROUND, Given, kept
from opcd.experience.gate import Decision, decide
from opcd.experience.items import read_prompt, written_items
from opcd.experience.measuring import Bench, Measured, agreement
from opcd.experience.successes import successes
from opcd.runtime.files import file_digest
from opcd.runtime.untrusted import plain_name
from opcd.training.loop import Diverged

Say = Callable[[str], None]


class Weights(NamedTuple):
    """A model, and what it reaches without experience."""

    name: str  # or folder
    validation: Measured
    elsewhere: PerRequest  # which answers are the original model's; empty where not measured


class Round(NamedTuple):
    """What a round has come to."""

    number: int
    began: str  # the model
    contexts: list[Path]  # that were worth distilling, the best first
    decision: Decision
    weights: Weights  # that the next round begins with
    row: dict[str, Any]  # for rounds.jsonl


class Phases:
    """What every round does, from the weights that it begins with."""

    def __init__(self, given: Given, bench: Bench, distilling: Distilling, say: Say) -> None:
        self.given, self.bench, self.distilling, self.say = given, bench, distilling, say
        self.config, self.experience = given.settings.training, given.settings.experience
        self.exercises = given.exercises
        self.folder, self.parts = given.folder, given.exercises.parts
        asks = self.experience.items_prompt or str(self.exercises.request)
        self.items_prompt = read_prompt(asks, self.exercises.places)
        stays = self.config.without_context
        self.instruction = "" if stays in ("default", "none") else stays
        self.validation = bench.requests("validation", self.parts.validation)

    @property
    def original(self) -> Weights:
        """The model before, measured once."""
        name = self.config.model

        problems = self.parts.validation
        found = Measured(
            **kept(
                self.folder / "before.json",
                lambda: self.bench.measure(name, self.validation, problems, judged=True)._asdict(),
            )
        )
        same = self.original_elsewhere
        return Weights(name, found, agreement(same, same))

    @property
    def original_elsewhere(self) -> list[list[int]]:
        """Its answers to unrelated requests."""
        return kept(
            self.folder / "elsewhere.json",
            lambda: self.bench.elsewhere(self.config.model, self.validation),
        )

    def round(self, number: int, weights: Weights) -> Round:
        """Attempt, extract, accumulate, filter, distil, decide."""
        folder = self.folder / f"{ROUND}{number}"
        folder.mkdir(exist_ok=True)
        tried = kept(folder / "attempts.json", lambda: self.attempts(number, weights, folder))
        attempts = read_attempts(tried["attempts"])
        counts = summary(attempts, tried["dropped"])
        self.say(f"attempts  {counts['right']} right of {counts['attempts']}{_lost(counts)}")
        items = kept(folder / "items.json", lambda: self.items(number, weights, attempts))
        made = kept(
            folder / "candidates.json", lambda: self.candidates(number, attempts, items, folder)
        )
        _check_as_written(made, folder / "candidates")
        found = kept(
            folder / "filter.json", lambda: self.filtered(made, weights, folder / "candidates")
        )
        _check_names(found["winners"], folder / "filter.json")
        contexts = [folder / "candidates" / name for name in found["winners"]]
        after: Weights | None = None
        if not contexts:
            decision = Decision(False, _why_none(counts, items, found))
        else:
            self.say(f"filter    {_filter_line(found)}")
            decision, after = self.distilled(number, weights, contexts, folder)
        row = {
            "round": number,
            "began_with": weights.name,
            "attempts": counts,
            "items": len(items),
            **found,
            "distilled": after.validation.summary() if after else None,
            "elsewhere": after.elsewhere.summary(share=True)
            if after and after.elsewhere.totals
            else None,
            **decision._asdict(),
        }
        taken = after if after is not None and decision.accepted else weights
        return Round(number, weights.name, contexts, decision, taken, row)

    def attempts(self, number: int, weights: Weights, folder: Path) -> dict[str, Any]:
        """Attempt: at problems that this round draws, or what a log holds."""
        if self.exercises.logged is not None:
            found, lost = self.exercises.logged
        else:
            train, seed = self.parts.train, self.config.seed
            count = min(self.experience.problems_per_round, len(train))
            problems = random.Random(f"{seed} {number}").sample(train, count)
            requests = self.bench.requests(f"round-{number}/problems", problems)
            model = self.bench.model(weights.name, self.bench.setup(requests))
            times = self.experience.attempts_per_problem
            found, lost = sampled_attempts(self.exercises, model, problems, times, number)
        return {"attempts": [attempt.as_dict() for attempt in found], "dropped": lost}

    def items(self, number: int, weights: Weights, attempts: Sequence[Attempt]) -> list[str]:
        """Extract: items, on requests that show attempts."""
        if self.experience.learn_from == "successes":
            return []
        reward = self.experience.reward
        requests = self.exercises.item_requests(attempts, self.items_prompt, reward)
        model = self.bench.model(weights.name, self.bench.setup(self.validation))
        return written_items(model, requests, number)

    def candidates(
        self, number: int, attempts: Sequence[Attempt], items: Sequence[str], folder: Path
    ) -> list[dict[str, Any]]:
        """Accumulate: contexts within the tokens that they may take."""
        setup, its = self.bench.setup(self.validation), self.experience
        sizes = its.candidates, its.context_tokens, self.config.seed + number
        made: list[Candidate] = items_candidates(items, self.instruction, setup, *sizes)
        if its.learn_from != "items":
            made += success_candidates(successes(attempts), self.instruction, setup, *sizes)
        (folder / "candidates").mkdir(exist_ok=True)
        return [
            {
                "file": path.name,
                "kind": candidate.kind,
                "size": candidate.size,
                "tokens": context_tokens(candidate.messages, setup),
                "digest": file_digest(path),
            }
            for candidate in made
            for path in [candidate.write(folder / "candidates")]
        ]

    def filtered(
        self, made: Sequence[dict[str, Any]], weights: Weights, folder: Path
    ) -> dict[str, Any]:
        """Filter: the candidates on validation problems, each kept as it is scored."""

        def score(file: Path) -> Measured:
            found = kept(
                file.with_name(f"{file.stem}.scored.json"),
                lambda: self.bench.measure(
                    weights.name, self.validation, self.parts.validation, file
                )._asdict(),
            )
            return Measured(**found)

        found = scored(made, folder, score)
        return ranked(made, found, weights.validation, self.experience.experiences)

    def distilled(
        self, number: int, weights: Weights, contexts: Sequence[Path], folder: Path
    ) -> tuple[Decision, Weights | None]:
        """Distil and measure; the decision, and the new weights if there are any."""
        run = folder / "run"

        def make() -> dict[str, Any]:
            try:
                self.distilling.run(number, weights.name, contexts, run)
            except Diverged as error:
                return {"diverged": str(error)}
            return self.measured(str(run / "final"))

        found = kept(folder / "after.json", make)
        if "diverged" in found:
            return Decision(False, f"training diverged: {found['diverged']}"), None
        same = agreement(found["elsewhere"], self.original_elsewhere)
        after = Weights(str(run / "final"), Measured(**found["validation"]), same)
        most = self.experience.elsewhere_loss
        decision = decide(weights.validation, after.validation, weights.elsewhere, same, most)
        return decision, after

    def measured(self, name: str) -> dict[str, Any]:
        """New weights on validation problems, and elsewhere."""
        found = self.bench.measure(name, self.validation, self.parts.validation)
        return {
            "validation": found._asdict(),
            "elsewhere": self.bench.elsewhere(name, self.validation),
        }


def _check_as_written(made: Sequence[dict[str, Any]], folder: Path) -> None:
    """Raise InputError for contexts that are no longer what was, or will be, scored."""
    _check_names([row["file"] for row in made], folder)
    for row in made:
        file = folder / row["file"]
        digest = file_digest(file) if file.is_file() else None
        if digest != row.get("digest", digest) or digest is None:
            raise InputError(
                f"{file} must be as the loop wrote it, got {'another text' if digest else 'none'}; "
                f"restore it, or start another output_dir"
            )


def _check_names(names: Sequence[str], where: Path) -> None:
    """Raise InputError for contexts that lie elsewhere: a loop's folder may be a stranger's."""
    for name in names:
        if not plain_name(name):
            raise InputError(
                f"{where} must name contexts of this round, got {name!r:.80}; restore it, or start "
                f"another output_dir"
            )


def _lost(counts: dict[str, Any]) -> str:
    lost = ", ".join(f"{count} {why}" for why, count in counts["dropped"].items())
    return f"; dropped: {lost}" if lost else ""


def _why_none(counts: dict[str, Any], items: Sequence[str], found: dict[str, Any]) -> str:
    if candidates := found["candidates"]:
        best, without = (
            "not judged" if x["accuracy"] is None else f"{x['accuracy']:.1%}"
            for x in (candidates[0], found["without"])
        )
        return (
            f"none of {len(candidates)} contexts is better on validation than no experience (the "
            f"best {best}, without {without})"
        )
    written = f"{len(items)} items were" if items else "no item was"
    right = f"{counts['right']} of {counts['judged']} attempts are right"
    fits = "; none of it fits context_tokens" if items or counts["right"] else ""
    return f"nothing to learn from: {written} written, and {right}{fits}"


def _filter_line(found: dict[str, Any]) -> str:
    best, without = found["candidates"][0], found["without"]["accuracy"]
    return (
        f"{best['file']} of {len(found['candidates'])} contexts: {best['accuracy']:.1%} on "
        f"validation, without {without:.1%}"
    )
