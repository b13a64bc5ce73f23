"""START HERE: the loop. A model distils what it learned from its own attempts.

attempt ── the model as it is, at problems with answers (or a server's log) ──► attempts
extract ── items that it writes about them, right attempts as demonstrations ──► experience
filter  ── contexts made of that, scored on validation problems ──► the best one, if it helps
distil  ── as any other context, into the weights ──► new weights
gate    ── better on validation beyond chance, and not worse elsewhere? taken, else rolled back

What a phase finds is a file, complete or absent; a loop that was killed reads those that are there
and makes the others, with the same draws.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.evaluation.intervals import PerRequest
from opcd.experience.attempts import Attempt, read_attempts, sampled_attempts, summary
from opcd.experience.checking import Checkers
from opcd.experience.contexts import (
    Candidate,
    context_tokens,
    items_candidates,
    success_candidates,
)
from opcd.experience.filtering import ranked, scored
from opcd.experience.folder import Given, begin, kept
from opcd.experience.gate import Decision, decide
from opcd.experience.items import read_prompt, written_items
from opcd.experience.measuring import Bench, Measured, agreement, placement
from opcd.experience.report import write_report
from opcd.experience.settings import Settings
from opcd.experience.successes import successes
from opcd.runtime.files import write_json, write_jsonl
from opcd.runtime.progress import Progress
from opcd.tasks.contexts import read_contexts
from opcd.tasks.data import Example, request_of
from opcd.tasks.messages import user
from opcd.training.loop import Diverged
from opcd.training.run import train

COLUMNS = {
    "base": "the model before",
    "base_experienced": "before, with what it wrote down first",
    "distilled": "after the last accepted round",
    "off_policy": "the same contexts, distilled on the prompted model's own completions",
    "distilled_experienced": "after, with the last accepted experience",
}


class Outcome(NamedTuple):
    """What has become of a loop."""

    folder: Path
    rounds: list[dict[str, Any]]  # as in rounds.jsonl
    columns: dict[str, Any]  # of the final test; {} where the loop was stopped before
    stopped: str | None = None  # why; resume goes on


class Stopped(Exception):
    """A distillation was ended, and saved."""


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


def learn(
    settings: Settings,
    resume: bool = False,
    say: Callable[[str], None] = lambda text: None,
    shown: Callable[[], AbstractContextManager[Progress]] = lambda: _Silent(),
) -> Outcome:
    """Run all rounds, then look at the test problems, once.

    say: gets lines for people. shown: opens what a distillation tells, and may stop it.
    Raises InputError for whatever a user gave that does not fit.
    """
    given = begin(settings, resume)
    experience = given.settings.experience
    with Checkers(given.settings.training.scorer, experience.check_seconds) as checkers:
        bench = Bench(given.settings.training, given.folder, checkers)
        try:
            return _Loop(given, bench, say, shown).run()
        finally:
            bench.release()


class _Silent(Progress):
    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


class _Loop:
    def __init__(
        self,
        given: Given,
        bench: Bench,
        say: Callable[[str], None],
        shown: Callable[[], AbstractContextManager[Progress]],
    ) -> None:
        self.given, self.bench, self.say, self.shown = given, bench, say, shown
        self.settings = given.settings
        self.config, self.experience = given.settings.training, given.settings.experience
        self.folder, self.parts = given.folder, given.parts
        self.items_prompt = read_prompt(self.experience.items_prompt)
        self.instruction = (
            ""
            if self.config.without_context in ("default", "none")
            else self.config.without_context
        )
        self.validation = bench.requests("validation", self.parts.validation)

    def run(self) -> Outcome:
        rounds: list[Round] = []
        columns: dict[str, Any] = {}
        stopped = None
        self.say(
            f"problems  {len(self.parts.train)} to learn from, {len(self.parts.validation)} to "
            f"choose by, {len(self.parts.test)} to be looked at once"
        )
        try:
            for one in self.rounds():
                rounds.append(one)
                self.write(rounds, columns)
            columns = self.columns(rounds)
        except Stopped as why:
            stopped = str(why)
        self.write(rounds, columns)
        return Outcome(self.folder, [one.row for one in rounds], columns, stopped)

    def rounds(self) -> Iterator[Round]:
        """Each round from the weights that the one before it left."""
        weights = self.original
        for number in range(1, self.experience.rounds + 1):
            one = self.round(number, weights)
            taken = "accepted" if one.decision.accepted else "rolled back"
            self.say(f"round {number}   {taken}: {one.decision.reason}")
            yield one
            weights = one.weights

    @property
    def original(self) -> Weights:
        """The model before, measured once."""
        name = self.config.model
        found = Measured(
            **kept(
                self.folder / "before.json",
                lambda: self.bench.measure(name, self.validation, self.parts.validation)._asdict(),
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
        folder = self.folder / f"round-{number}"
        folder.mkdir(exist_ok=True)
        tried = kept(folder / "attempts.json", lambda: self.attempts(number, weights, folder))
        attempts = read_attempts(tried["attempts"])
        counts = summary(attempts, tried["dropped"])
        self.say(f"attempts  {counts['right']} right of {counts['attempts']}{_lost(counts)}")
        items = kept(folder / "items.json", lambda: self.items(number, weights, attempts))
        made = kept(
            folder / "candidates.json", lambda: self.candidates(number, attempts, items, folder)
        )
        found = kept(
            folder / "filter.json", lambda: self.filtered(made, weights, folder / "candidates")
        )
        contexts = [folder / "candidates" / name for name in found["winners"]]
        after: Weights | None = None
        if not contexts:
            decision = Decision(False, _why_none(counts, items, made))
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
        if self.given.logged is not None:
            found, lost = self.given.logged
        else:
            train, seed = self.parts.train, self.config.seed
            count = min(self.experience.problems_per_round, len(train))
            problems = random.Random(f"{seed} {number}").sample(train, count)
            requests = self.bench.requests(f"round-{number}/problems", problems)
            setup = self.bench.setup(requests)
            found, lost = sampled_attempts(
                self.bench.model(weights.name, setup),
                setup.task.training,
                self.bench.checkers,
                [p.answers for p in problems],
                self.experience.attempts_per_problem,
                number,
            )
        return {"attempts": [attempt.as_dict() for attempt in found], "dropped": lost}

    def items(self, number: int, weights: Weights, attempts: Sequence[Attempt]) -> list[str]:
        """Extract: items, about one attempt at each problem, the newest problems of a log."""
        if self.experience.learn_from == "successes":
            return []
        first: dict[str, Attempt] = {}
        for attempt in attempts:
            first.setdefault(json.dumps(attempt.problem), attempt)
        chosen = [*first.values()][-self.experience.problems_per_round :]
        model = self.bench.model(weights.name, self.bench.setup(self.validation))
        return written_items(model, chosen, self.items_prompt, self.experience.reward, number)

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
                "file": candidate.write(folder / "candidates").name,
                "kind": candidate.kind,
                "size": candidate.size,
                "tokens": context_tokens(candidate.messages, setup),
            }
            for candidate in made
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
        try:
            self.distil(number, weights.name, contexts, run)
        except Diverged as error:
            return Decision(False, f"training diverged: {error}"), None
        name = str(run / "final")
        found = kept(folder / "after.json", lambda: self.measured(name))
        same = agreement(found["elsewhere"], self.original_elsewhere)
        after = Weights(name, Measured(**found["validation"]), same)
        most = self.experience.elsewhere_loss
        return (
            decide(weights.validation, after.validation, weights.elsewhere, same, most),
            after,
        )

    def measured(self, name: str) -> dict[str, Any]:
        """New weights on validation problems, and elsewhere."""
        found = self.bench.measure(name, self.validation, self.parts.validation)
        return {
            "validation": found._asdict(),
            "elsewhere": self.bench.elsewhere(name, self.validation),
        }

    def distil(
        self,
        number: int,
        model: str,
        contexts: Sequence[Path],
        run: Path,
        **changed: Any,
    ) -> None:
        """Move contexts into a model's weights. Raises Stopped where that was ended before."""
        self.bench.release()
        context, prompts = self.training_files(number, contexts)
        config = replace(
            self.config,
            model=model,
            context=str(context),
            context_placement=placement(self.config, contexts[0].stem.partition("-")[0]),
            prompts=str(prompts),
            validation_data=None,
            test_data=None,
            held_out_share=0.0,
            elsewhere_prompts=0,
            scorer="exact",
            output_dir=str(run),
            seed=_seed(self.config.seed, number),
            **changed,
        )
        with self.shown() as progress:
            outcome = train(config, (run / "config.yaml").is_file(), progress)
        if outcome.stopped:
            raise Stopped(outcome.stopped)

    def training_files(self, number: int, contexts: Sequence[Path]) -> tuple[Path, Path]:
        """Contexts as one file, and the training prompts without those that a context shows.

        Of several contexts each prompt names one, drawn by its words.
        """
        folder = self.folder / f"round-{number}"
        shown = {_asked(text) for path in contexts for text in _users(path)}
        rows = []
        for problem in self.parts.train:
            if _asked(problem.text) in shown:
                continue
            row: dict[str, Any] = {"messages": list(problem.messages)}
            if len(contexts) > 1:
                drawn = random.Random(f"{self.config.seed} {number} {request_of(problem)}")
                row["context"] = drawn.choice(contexts).stem
            rows.append(row)
        if not rows:
            raise InputError(
                f"training prompts must be left beside those that the experience shows, got none "
                f"of {len(self.parts.train)}; add problems, or lower context_tokens"
            )
        prompts = folder / "prompts.jsonl"
        write_jsonl(prompts, rows)
        if len(contexts) == 1:
            return contexts[0], prompts
        several = folder / "experiences.json"
        write_json(several, {path.stem: _messages(path) for path in contexts})
        return several, prompts

    def columns(self, rounds: Sequence[Round]) -> dict[str, Any]:
        """The final test: trained first, then looked at once."""
        accepted = [one for one in rounds if one.decision.accepted]
        tried = [one for one in rounds if one.contexts]
        models: dict[str, tuple[str, Path | None]] = {"base": (self.config.model, None)}
        if tried:
            first = (accepted or tried)[0]
            if first.began == self.config.model:
                models["base_experienced"] = self.config.model, first.contexts[0]
        if accepted:
            last = accepted[-1]
            models["distilled"] = last.weights.name, None
            models["distilled_experienced"] = last.weights.name, last.contexts[0]
            if self.experience.off_policy and (name := self.off_policy(accepted)):
                models["off_policy"] = name, None
        requests = self.bench.requests("test", self.parts.test)
        folder = self.folder / "test"
        folder.mkdir(exist_ok=True)
        return {
            name: self.column(name, *models[name], requests, folder)
            for name in COLUMNS
            if name in models
        }

    def column(
        self, name: str, model: str, context: Path | None, requests: Path, folder: Path
    ) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            found = self.bench.measure(model, requests, self.parts.test, context)
            elsewhere = self.bench.elsewhere(model, self.validation) if context is None else []
            return {"test": found._asdict(), "elsewhere": elsewhere}

        found = kept(folder / f"{name}.json", measure)
        test = Measured(**found["test"])
        same = (
            agreement(found["elsewhere"], self.original_elsewhere) if found["elsewhere"] else None
        )
        return {
            "meaning": COLUMNS[name],
            **test.summary(),
            "values": test.values,
            "elsewhere": same.summary(share=True) if same else None,
        }

    def off_policy(self, accepted: Sequence[Round]) -> str | None:
        """The accepted rounds again, each on its prompted model's completions alone."""
        model = self.config.model
        for one in accepted:
            run = self.folder / f"round-{one.number}" / "off_policy"
            teacher = one.began if one.began != model else None
            changed = {"guided_share": 1.0, "teacher": teacher}
            try:
                self.distil(one.number, model, one.contexts, run, **changed)
            except Diverged as error:
                self.say(f"off-policy training diverged: {error}")
                return None
            model = str(run / "final")
        return model

    def write(self, rounds: Sequence[Round], columns: dict[str, Any]) -> None:
        """rounds.jsonl and the report, of what is there so far."""
        rows = [one.row for one in rounds]
        write_jsonl(self.folder / "rounds.jsonl", rows)
        contexts = {one.number: one.contexts for one in rounds}
        write_report(self.folder, rows, contexts, columns, self.settings)


def _seed(seed: int, number: int) -> int:
    """A run's own: rounds draw otherwise from the same prompts."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _messages(path: Path) -> list[Any]:
    return read_contexts(str(path))[0][""].messages


def _users(path: Path) -> list[str]:
    """The problems that a context shows."""
    return [m["content"] for m in _messages(path) if m["role"] == "user"]


def _asked(text: str) -> tuple[str, str]:
    """What makes two problems the same in what they ask last."""
    return request_of(Example((user(text),), (), ""))


def _lost(counts: dict[str, Any]) -> str:
    lost = ", ".join(f"{count} {why}" for why, count in counts["dropped"].items())
    return f"; dropped: {lost}" if lost else ""


def _why_none(counts: dict[str, Any], items: Sequence[str], made: Sequence[object]) -> str:
    if made:
        return f"none of {len(made)} contexts is better on validation than no experience"
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
