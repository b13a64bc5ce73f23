"""The commands: what each is given, and what it calls."""

import argparse
import contextlib
import json
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opcd import __version__
from opcd.arguments import BEGIN
from opcd.config.fields import FIELDS, TrainConfig
from opcd.config.settings import code_of, converted_to, gather, of_a_run, refuse_code
from opcd.errors import InputError
from opcd.experience.settings import KINDS as EXPERIENCE_FIELDS
from opcd.experience.settings import read_settings
from opcd.runtime.libraries import set_up_libraries
from opcd.serving.wanted import KINDS as SERVING_FIELDS
from opcd.serving.wanted import Wanted

STOPPED_BY_ALARM = 3  # the exit status
# What a command calls of the functions that a configuration may name; those that train call all.
CALLED = {
    **dict.fromkeys(("check", "chat", "verify", "serve-report"), ("scorer",)),
    "eval": ("scorer", "elsewhere_tasks"),
}


def run(arguments: argparse.Namespace) -> int:
    """Run a command; returns its exit status."""
    if arguments.command is None:
        print(BEGIN, end="")
        return 0
    if arguments.command == "init":
        from opcd.starter import write_starter

        written = write_starter(Path(arguments.folder))
        file = shlex.quote(str(written))
        command = f"opcd check --config {file}\n  opcd train --config {file}"
        print(f"written: a small task. Distil it:\n  {command}")
        return 0
    if arguments.command == "eval" and arguments.compare:
        return _compare(arguments)
    alone = {
        "chat": _chat,
        "verify": _verify,
        "serve-report": _serve_report,
        "experience": _experience,
    }
    if arguments.command in alone:
        return alone[arguments.command](arguments)
    config = _config(arguments)  # what is wrong here is said before anything is loaded
    if of_a_run(arguments.config):
        _check_code(arguments, code_of(config))
    _load()
    commands = {"check": _check, "train": _train, "eval": _evaluate, "rivals": _rivals}
    return commands[arguments.command](arguments, config)


def _load() -> None:
    """Import what takes seconds, and say so first."""
    print(f"opcd {__version__}: loading", file=sys.stderr, flush=True)
    set_up_libraries()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("opcd").setLevel(logging.INFO)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _check(arguments: argparse.Namespace, config: TrainConfig) -> int:
    from opcd.preflight.check import check
    from opcd.runtime.files import make_folder
    from opcd.tasks.prepare import prepare
    from opcd.terminal import Terminal
    from opcd.training.duration import expected_seconds

    setup = prepare(config, for_training=config.prompts is not None)
    folder = make_folder(Path(config.output_dir))
    with _scorecard_alone(arguments) as show, Terminal(finishes_steps=False) as terminal:
        expected = arguments.expected_requests
        found = check(setup, lambda: expected_seconds(setup), terminal, expected)
    found.write(folder)
    show(found.as_dict())
    return 0 if found.verdict.goes else 1


def _train(arguments: argparse.Namespace, config: TrainConfig) -> int:
    from opcd.evaluation.evaluate import read_scorecard
    from opcd.terminal import Terminal, show_trained
    from opcd.training.run import train

    with _scorecard_alone(arguments) as show, Terminal() as terminal:
        outcome = train(config, arguments.resume, terminal)
    show(read_scorecard(outcome.folder))
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        show_trained(outcome, config)
    if not outcome.stopped:
        return 0
    return 128 + terminal.caught if terminal.caught else STOPPED_BY_ALARM


def _evaluate(arguments: argparse.Namespace, config: TrainConfig) -> int:
    from opcd.terminal import Terminal, show_evaluated
    from opcd.training.evaluate import evaluate_run

    contenders = _named(arguments)
    with _scorecard_alone(arguments) as show, Terminal(finishes_steps=False) as terminal:
        folder, found = evaluate_run(
            *(config, arguments.distilled, arguments.save_to, terminal),
            *(contenders, arguments.served_model),
        )
    show(found.card)
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        show_evaluated(folder, found)
    return 0


def _rivals(arguments: argparse.Namespace, config: TrainConfig) -> int:
    from opcd.studies.rivals import rivals
    from opcd.studies.table import rivals_table
    from opcd.terminal import Terminal

    with _scorecard_alone(arguments) as show, Terminal(finishes_steps=False) as terminal:
        found = rivals(config, arguments.rival, arguments.other_context, terminal)
    show(found)
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        print(f"\n{rivals_table(found)}\n\nwritten: {Path(config.output_dir) / 'rivals'}")
    return 0


def _named(arguments: argparse.Namespace) -> dict[str, str]:
    """Who else answers, by name. Raises InputError for what is not NAME=WHAT, and for one twice."""
    found: dict[str, str] = {}
    given = [
        *arguments.contender,
        *([f"server={arguments.base_url}"] if arguments.base_url else []),
    ]
    for text in given:
        name, equals, what = text.partition("=")
        if not (name and equals and what) or name in found:
            raise InputError(
                f"a contender must be given as NAME=WHAT, each name once, got {text!r}; write "
                f"short=short.md, for example"
            )
        found[name] = what
    return found


def _compare(arguments: argparse.Namespace) -> int:
    from opcd.evaluation.compare import compare, comparison_table, draw_comparison

    found = compare([Path(run) for run in arguments.compare])
    if arguments.json:
        print(json.dumps([run.card for run in found], indent=2))
        return 0
    picture = Path(arguments.save_to or ".") / "compare.svg"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_comparison(found, picture)
    print(f"{comparison_table(found)}\n\nwritten: {picture}")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    run = Path(arguments.run)
    config = _config_of(run, arguments)
    _load()
    from opcd.evaluation.side_by_side import SideBySide
    from opcd.terminal import converse

    with contextlib.closing(SideBySide(config, run / "final")) as models:
        converse(models, arguments.message, arguments.context_name)
    return 0


def _experience(arguments: argparse.Namespace) -> int:
    file = Path(arguments.config) if arguments.config else None
    fields = {k: v for k, v in vars(arguments).items() if k in FIELDS or k in EXPERIENCE_FIELDS}
    settings = read_settings(fields, file, arguments.preset, arguments.log)
    if of_a_run(file):
        _check_code(arguments, code_of(settings.training) | settings.experience.named_code)
    _load()
    from opcd.experience.rounds import learn
    from opcd.terminal import Terminal, show_learned

    def say(text: str) -> None:
        print(text, flush=True)

    outcome = learn(settings, arguments.resume, say, Terminal)
    show_learned(outcome)
    if not outcome.stopped:
        return 0
    caught = signal.Signals.__members__.get(outcome.stopped)
    return 128 + caught if caught else STOPPED_BY_ALARM


def _verify(arguments: argparse.Namespace) -> int:
    run = Path(arguments.run)
    config = _config_of(run, arguments)
    _load()
    from opcd.evaluation.verify import verify

    with _scorecard_alone(arguments) as show:
        found = verify(run, config)
        print("\n".join(found.lines))
    show(found.as_dict())
    return 0 if found.agrees else 1


def _serve_report(arguments: argparse.Namespace) -> int:
    run = Path(arguments.run)
    config = _config_of(run, arguments)
    given = {name: value for name, value in vars(arguments).items() if name in SERVING_FIELDS}
    kinds = SERVING_FIELDS.items()
    wanted = Wanted(
        **{n: converted_to(kind, n, given[n], "command line") for n, kind in kinds if n in given}
    )
    wanted.check()
    _load()
    from opcd.runtime.interrupts import raised
    from opcd.serving.serve import serve_report
    from opcd.terminal import Terminal, show_served

    # A server that is started must end, whatever ends this.
    with _scorecard_alone(arguments) as show, Terminal(finishes_steps=False) as terminal, raised():
        found = serve_report(run, config, wanted, terminal)
    show(found.as_dict())
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        show_served(run, found)
    return 0 if found.agrees else 1


def _config_of(run: Path, arguments: argparse.Namespace) -> TrainConfig:
    """The configuration of a run's folder, which may be a stranger's."""
    from opcd.runtime.untrusted import check_run_folder

    if run.is_dir():
        check_run_folder(run)
    given = {"scorer": arguments.scorer} if getattr(arguments, "scorer", None) else {}
    config = gather(given, run / "config.yaml")
    _check_code(arguments, code_of(config))
    return config


def _check_code(arguments: argparse.Namespace, named: Mapping[str, str]) -> None:
    """Raise InputError for functions that a file names and the command would call."""
    if not arguments.allow_code:
        called = CALLED.get(arguments.command)
        refuse_code(named, f"opcd {arguments.command}", vars(arguments), called)


@contextlib.contextmanager
def _scorecard_alone(arguments: argparse.Namespace) -> Iterator[Callable[[Any], None]]:
    """With --json, standard output gets the scorecard and nothing else; yields what prints it."""

    def show(card: Any) -> None:
        if arguments.json:
            print(json.dumps(card, indent=2))

    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        yield show


def _config(arguments: argparse.Namespace) -> TrainConfig:
    given = {name: value for name, value in vars(arguments).items() if name in FIELDS}
    file = Path(arguments.config) if arguments.config else None
    return gather(given, file, arguments.preset)
