"""On-policy context distillation against what else a prompt can become.

Each rival has the same training prompts and the same seed. Those that learn from their own
completions take as many steps as the run that is configured; those that learn from stored ones as
many as come closest to its tokens. Rows are kept as they come: what is there is not run again.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.evaluation.contenders import Contender, Models
from opcd.evaluation.evaluate import evaluate, read_scorecard, write_evaluation
from opcd.evaluation.named import named_contenders
from opcd.objective import Divergence, head_divergence
from opcd.runtime.files import (
    file_digest,
    make_folder,
    read_metrics,
    write_json,
    write_jsonl,
    write_text,
)
from opcd.runtime.memory import release_memory
from opcd.runtime.progress import Progress
from opcd.studies.catalogue import (
    BARE,
    COMPRESSED,
    CONTROLS,
    OWN,
    REFERENCE,
    SOFT,
    TRAINED,
    Trained,
)
from opcd.studies.checks import (
    check_inputs,
    check_other,
    checked_task,
    chosen_rivals,
    hindrances,
    same_settings,
)
from opcd.studies.compression import compress_to, llmlingua
from opcd.studies.soft_prompts import train_soft_prompt
from opcd.studies.stored import Stored, store_completions
from opcd.studies.table import rivals_table
from opcd.tasks.chat import Chat
from opcd.tasks.messages import Message, assistant, user
from opcd.tasks.prepare import Setup, prepare
from opcd.tasks.task import rendered, spread
from opcd.training.guided import FILE as STORED_FILE
from opcd.training.run import Outcome, train

SHOWN = 4  # demonstrations
FOLDER = "rivals"


def rivals(
    config: TrainConfig,
    wanted: Sequence[str] = (),  # names of rivals; default all, without other_context
    other_context: str | None = None,  # another task's, for the control
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A row for each rival, kept in rivals/rivals.jsonl of the configuration's output_dir.

    Unless they are wanted by name, those that the task or this machine lacks something for are left
    out: a soft prompt as long as the context, a compressed one without the package for it.

    Raises InputError for a name that there is not, for a task that they cannot share, and for rows
    of other settings, files or models.
    """
    progress = progress or Progress()
    setup = checked_task(config)
    hindered = hindrances(setup, other_context)
    chosen = chosen_rivals(wanted, hindered)
    for needs in [] if wanted else dict.fromkeys(hindered.values()):
        names = ", ".join(name for name in hindered if hindered[name] == needs)
        progress.say(f"rivals    without {names}: needs {needs.partition(';')[0]}")
    digest = check_other(setup, other_context) if "other_context" in chosen else None
    folder = make_folder(Path(config.output_dir) / FOLDER)
    config = same_settings(setup.config, folder)
    if config.today != setup.config.today:
        setup = checked_task(config)
    check_inputs(setup, folder)
    study = _Study(config, folder, other_context, progress)
    if digest and study.rows.get("other_context", {}).get("context", digest) != digest:
        raise InputError(
            f"{folder} has the rival other_context with another context than {other_context!r}; "
            f"name that one, or another output_dir"
        )
    for name in chosen:
        if name not in study.rows:
            study.add(name)
    rows = [study.rows[name] for name in ("base", "prompted", *chosen)]
    write_text(study.folder / "rivals.md", f"```\n{rivals_table(rows)}\n```\n")
    return rows


class _Study:
    """The rows so far, and what a rival takes of those before it."""

    def __init__(
        self, config: TrainConfig, folder: Path, other_context: str | None, progress: Progress
    ) -> None:
        self.folder = folder
        self._config = config
        self._other_context = other_context
        self._progress = progress
        self._file = folder / "rivals.jsonl"
        lines = self._file.read_text("utf-8").splitlines() if self._file.is_file() else []
        self.rows = {row["rival"]: row for row in map(json.loads, lines)}

    def add(self, name: str) -> None:
        """Run a rival, and keep its row."""
        self._progress.say(f"rival     {name}")
        if name in TRAINED:
            found = self._trained(name, TRAINED[name])
        elif name in COMPRESSED:
            found = self._compressed(name)
        elif name in SOFT:
            found = self._soft(name)
        elif name in CONTROLS:
            found = self._control(name)
        else:
            found = self._demonstrations()
        with self._file.open("a", encoding="utf-8") as file:
            for row in found:
                if row["rival"] not in self.rows:
                    self.rows[row["rival"]] = row
                    file.write(json.dumps(row) + "\n")

    def _trained(self, name: str, rival: Trained) -> list[dict[str, Any]]:
        config = replace(self._config, **rival.settings)
        if rival.stored:
            file, made = self._stored()
            config = replace(config, steps=made.steps)
            if not (own := make_folder(self.folder / name) / STORED_FILE).is_file():
                shutil.copyfile(file, own)
        found = self._run(name, config, rival.divergence)
        row = self._row(name, rival.what, found, "distilled") | self._cost(name)
        if rival.stored:
            row["train_s"] += made.seconds
        if name != REFERENCE:
            return [row]
        meanings = {"base": "no prompt", "prompted": "the prompt"}
        both = [self._row(who, what, found, who) for who, what in meanings.items()]
        saved = found["prompt_tokens_saved"]
        both[1] |= {"prompt_tokens": saved, "extra_work": "reads the prompt, or a cache of it"}
        return [*both, row]

    def _run(self, name: str, config: TrainConfig, divergence: Divergence) -> dict[str, Any]:
        """The scorecard of a training run; its weights are deleted."""
        folder = self.folder / name
        if (card := read_scorecard(folder)) is None:
            own = replace(config, output_dir=str(folder))
            begun = (folder / "config.yaml").is_file()
            _check_ended(name, train(own, begun, self._progress, divergence))
            card = read_scorecard(folder)
        assert card is not None
        _delete_weights(folder)
        return card

    def _cost(self, name: str) -> dict[str, Any]:
        """What a run's training took, from its metrics."""
        steps = [m for m in read_metrics(self.folder / name / "metrics.jsonl") if "loss" in m]
        return {
            "train_s": sum(m["step_time_s"] for m in steps),
            "tokens": sum(m["completion_tokens"] for m in steps),
            "steps": len(steps),
        }

    def _needed(self, name: str) -> dict[str, Any]:
        """The row of a rival that another one builds on; run now if need be."""
        if name not in self.rows:
            self.add(name)
        return self.rows[name]

    def _stored(self) -> tuple[Path, Stored]:
        """The teacher's completions: their file, in how many steps they come to the reference's
        tokens, and what they took."""
        folder = self.folder / "stored"
        kept = folder / "made.json"
        if not kept.is_file():
            tokens = self._needed(REFERENCE)["tokens"]
            setup = prepare(replace(self._config, **BARE), for_training=True)
            write_json(kept, store_completions(setup, tokens, folder)._asdict())
        return folder / STORED_FILE, Stored(**json.loads(kept.read_text("utf-8")))

    def _soft(self, name: str) -> list[dict[str, Any]]:
        file, made = self._stored()
        config = replace(self._config, guided_share=1.0, steps=made.steps, **BARE)
        setup, folder = prepare(config, for_training=True), self.folder / name
        seconds, tokens = train_soft_prompt(setup, file, SOFT[name], folder, self._progress)
        card = self._on_base(name, str(folder))
        row = self._row(name, "vectors trained on the teacher's completions", card, name)
        return [
            row
            | {
                "prompt_tokens": SOFT[name],
                "extra_work": "vectors in front, which servers must take",
            }
            | {"train_s": seconds + made.seconds, "tokens": tokens, "steps": made.steps}
        ]

    def _demonstrations(self) -> list[dict[str, Any]]:
        """A few training prompts with what the prompted model says to them, and no instructions."""
        setup = prepare(self._config)
        cases = spread([c for c in setup.task.training if len(c.example.messages) == 1], SHOWN)
        models = Models(setup)
        try:
            said = models.get(self._config.teacher or self._config.model).prompted(cases)
        finally:
            models.close()
        turns = [
            turn
            for case, answer in zip(cases, said, strict=True)
            if answer.text
            for turn in (user(case.example.text), assistant(answer.text))
        ]
        if not turns:
            raise InputError(
                "demonstrations need training prompts of one message that the prompted model "
                "answers, got none; leave that rival out"
            )
        what = f"{len(turns) // 2} of the prompted model's answers"
        return [self._prompt("demonstrations", what, turns, setup)]

    def _compressed(self, name: str) -> list[dict[str, Any]]:
        """The context with its least telling tokens left out, by measured tokens."""
        setup = prepare(self._config)
        compress = llmlingua(setup, setup.chat.context)
        whole = setup.task.prompt_tokens_saved
        found = compress_to(
            whole / COMPRESSED[name], compress, lambda messages: in_front(messages, setup)
        )
        del compress
        release_memory()
        what = f"the context, {whole / found.tokens:.1f} times shorter"
        return [self._prompt(name, what, found.messages, setup)]

    def _prompt(
        self, name: str, what: str, messages: Sequence[Message], setup: Setup
    ) -> dict[str, Any]:
        """The row of a prompt in place of the context."""
        file = self.folder / f"{name}.json"
        write_json(file, messages)
        row = self._row(name, what, self._on_base(name, str(file)), name)
        return row | {
            "prompt_tokens": in_front(messages, setup),
            "extra_work": "reads them, or a cache of them",
        }

    def _on_base(self, name: str, what: str) -> dict[str, Any]:
        """The scorecard of a contender on the untrained base."""
        setup = prepare(replace(self._config, leak_tokens=0))
        others: Callable[[Models], Sequence[Contender]] = named_contenders({name: what}, setup)
        found = evaluate(setup, None, self._progress, others=others)
        write_evaluation(make_folder(self.folder / f"{name}_scored"), found, setup)
        return found.card

    def _control(self, name: str) -> list[dict[str, Any]]:
        if name == "teacher_without":
            card = self._run(name, self._without_teacher(name), head_divergence)
        else:
            card = self._of_another(name)
        row = self._row(name, CONTROLS[name], card, "distilled") | self._cost(name)
        if self._other_context is not None and name == "other_context":
            row["context"] = file_digest(Path(self._other_context))
        return [row]

    def _without_teacher(self, name: str) -> TrainConfig:
        """The training prompts, and no others of their file, held to the model as it was."""
        task = prepare(self._config, for_training=True).task
        file = make_folder(self.folder / name) / "prompts.jsonl"
        write_jsonl(file, [{"messages": list(c.example.messages)} for c in task.training])
        turns = len(task.training) / len(task.conversations)
        return replace(
            self._config,
            **OWN
            | {"replay_share": 1.0, "replay_data": str(file)}
            | {"prompts_per_step": round(turns * self._config.prompts_per_step)},
        )

    def _of_another(self, name: str) -> dict[str, Any]:
        """Trained on another context, and scored by this task's."""
        assert self._other_context is not None
        folder = self.folder / name
        other = replace(
            self._config,
            context=self._other_context,
            output_dir=str(folder),
            elsewhere_prompts=0,  # that is asked below
            leak_tokens=0,
        )
        _check_ended(name, train(other, (folder / "config.yaml").is_file(), self._progress))
        setup = prepare(self._config)
        found = evaluate(setup, str(folder / "final"), self._progress)
        write_evaluation(make_folder(self.folder / f"{name}_scored"), found, setup)
        _delete_weights(folder)
        return found.card

    def _row(self, name: str, what: str, card: dict[str, Any], who: str) -> dict[str, Any]:
        """A contender of a scorecard as a rival."""
        column = card["contenders"][who]
        judged = "accuracy" in column
        agrees = column["greedy_agreement"]
        behind = "prompted" if who == "base" else f"{who}_prompted"
        harm = card["contenders"].get(behind, {}).get("harm")
        own = who != "distilled"  # the base's weights
        kept = card.get("elsewhere", {}).get("agreement", {})
        return {
            "rival": name,
            "what": what,
            **({"accuracy": column["accuracy"]} if judged else {}),
            "interval_95": column["accuracy_interval_95"] if judged else agrees["interval_95"],
            **{k: column[k] for k in ("balanced_accuracy",) if k in column},
            "greedy_agreement": agrees["mean"],
            "n": column["n"],
            "mean_completion_tokens": column["mean_completion_tokens"],
            "prompt_tokens": 0.0,
            "extra_work": "none",
            "train_s": 0.0,
            "tokens": 0,
            "steps": 0,
            "elsewhere": 1.0 if own else kept.get("mean"),
            "elsewhere_interval_95": None if own else kept.get("interval_95"),
            "harm": harm["mean"] if harm else None,
            "harm_interval_95": harm["interval_95"] if harm else None,
            "seed": self._config.seed,
        }


def in_front(messages: Sequence[Message], setup: Setup) -> float:
    """Tokens that a prompt in the context's place puts in front of a test request, on average."""
    config, cases = setup.config, setup.task.test
    chat = Chat(
        setup.chat.template,
        messages,
        config.context_placement,
        config.without_context,
        any(case.example.own_system for case in cases),
    )
    return fmean(
        len(rendered(chat.teacher_ids, case.example)) - len(case.prompt.student_ids)
        for case in cases
    )


def _check_ended(name: str, outcome: Outcome) -> None:
    """Raise InputError for a rival's run that was stopped."""
    if outcome.stopped:
        raise InputError(
            f"a rival's run must go to its end, but {name} was stopped by {outcome.stopped}; start "
            f"again, and it goes on"
        )


def _delete_weights(folder: Path) -> None:
    for weights in ("checkpoints", "final"):
        shutil.rmtree(folder / weights, ignore_errors=True)
