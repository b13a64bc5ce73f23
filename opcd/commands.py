"""The commands: what each is given, and what it calls."""

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from opcd import __version__
from opcd.config.fields import FIELDS, GROUPS, MEASURING, TrainConfig
from opcd.config.presets import PRESETS
from opcd.config.settings import KINDS, check_code, converted_to, gather, of_a_run, refuse_code
from opcd.errors import InputError, did_you_mean
from opcd.experience.settings import ITS_OWN, UNUSED, Experience, read_settings
from opcd.experience.settings import KINDS as EXPERIENCE_FIELDS
from opcd.serving.wanted import KINDS as SERVING_FIELDS
from opcd.serving.wanted import Wanted

SPINS = "5000"  # of a waiting thread; see `_let_waiting_threads_sleep`
# Of oneDNN, which keeps the code that it makes for a shape, half a megabyte each, of the last 1,024
# by default. Packed passes have new shapes in every step: of a hundred it has all that come again.
KERNELS = "128"
STOPPED_BY_ALARM = 3  # the exit status
PRESET_HELP = "; ".join(
    f"{name} ({', '.join(f'{field} {value}' for field, value in values.items())})"
    for name, values in PRESETS.items()
)
OTHER_NAMES = {"distill": "train", "distil": "train", "evaluate": "eval", "new": "init"}
BEGIN = f"""opcd {__version__}: a prompt into a model's weights, with the proof.

  opcd init my-task                             write a small task that runs as it is
  opcd check --config my-task/config.yaml       see before any training whether it is worth it
  opcd train --config my-task/config.yaml       distil it, and score it
  opcd experience --config problems.yaml        let a model learn from its own attempts
  opcd chat my-task/run                         ask base, prompted and distilled side by side
  opcd serve-report my-task/run                 what it saves on a server, against a cached prompt
  opcd verify my-task/run                       hold its figures against its answers and files
  opcd --help                                   every command
"""


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """What the command line says. Raises InputError for what it must not."""
    if argv and argv[0] in OTHER_NAMES:
        raise InputError(f"there is no command {argv[0]}; did you mean {OTHER_NAMES[argv[0]]}?")
    return _parser().parse_args([_underscored(word) for word in argv])


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
        _check_code(arguments, config)
    _load()
    commands = {"check": _check, "train": _train, "eval": _evaluate, "rivals": _rivals}
    return commands[arguments.command](arguments, config)


def _load() -> None:
    """Import what takes seconds, and say so first."""
    print(f"opcd {__version__}: loading", file=sys.stderr, flush=True)
    _let_waiting_threads_sleep()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
        _check_code(arguments, settings.training, settings.experience.named_code)
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
    _check_code(arguments, config)
    return config


def _check_code(
    arguments: argparse.Namespace, config: TrainConfig, more: Mapping[str, str] | None = None
) -> None:
    """Raise InputError for Python functions that a file names, unless they are allowed."""
    if not arguments.allow_code:
        command = f"opcd {arguments.command}"
        check_code(config, vars(arguments), command)
        refuse_code(more or {}, vars(arguments), command)


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


def _let_waiting_threads_sleep() -> None:
    """Before torch is imported: OpenMP's threads spin for some ten microseconds, then sleep.

    By default they spin for milliseconds at every small operation, and where another process keeps
    a core busy they take the time of those that they wait for. This is for libgomp, which torch's
    packages for Linux bring; what the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in a sentence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse; what is not known is an error here, with the nearest name."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [o for action in self._actions for o in action.option_strings]
            name = unknown[0].partition("=")[0]
            if name.removeprefix("--") in FIELDS:
                raise InputError(f"{name} is for training and does nothing here; leave it out")
            raise InputError(
                f"there is no option {name}{did_you_mean(name, options)}; see {self.prog} --help"
            )
        return found, unknown


def _parser() -> _Parser:
    parser = _Parser(prog="opcd", description=BEGIN)
    parser.add_argument("--version", action="version", version=f"opcd {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", parser_class=_Parser
    )
    for name, summary in (
        ("check", "Look at a prompt before any training: what it changes, what it will cost."),
        ("train", "Distil a context into a model, then score it on test data."),
        ("eval", "Score a distilled model against the base model, with and without the context."),
        ("rivals", "Train and score what else a prompt can become, on the same prompts."),
    ):
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument("--config", metavar="FILE", help="YAML file with the fields below")
        sub.add_argument("--preset", metavar="NAME", help=f"settings to start from: {PRESET_HELP}")
        printed = {"check": "what was found", "rivals": "the rows"}.get(name, "the scorecard")
        sub.add_argument("--json", action="store_true", help=f"print {printed} and nothing else")
        _add_allow_code(sub)
        if name == "train":
            sub.add_argument("--resume", action="store_true", help="continue the run in output_dir")
            _add_fields(sub, FIELDS)
        elif name == "check":
            sub.add_argument(
                "--expected_requests",
                type=float,
                metavar="N",
                help="requests that come between two changes of the prompt, if it is known",
            )
            _add_fields(sub, FIELDS)
        elif name == "rivals":
            sub.add_argument(
                "--rival",
                action="append",
                default=[],
                metavar="NAME",
                help="this one, beside opcd; may be given several times; default: all",
            )
            sub.add_argument(
                "--other_context",
                metavar="FILE",
                help="another task's context, for the control that learns from it",
            )
            _add_fields(sub, FIELDS)
        else:
            sub.add_argument(
                "--distilled",
                metavar="MODEL",
                help="model to score; default output_dir/final; none: only base and prompted",
            )
            sub.add_argument(
                "--save_to",
                metavar="FOLDER",
                help="for scorecard and report; default output_dir, or a new folder in it where "
                "something that is measured by is not as in training",
            )
            _add_contenders(sub)
            _add_fields(sub, MEASURING)
    _add_experience(commands)
    chat = commands.add_parser(
        "chat",
        help="Ask a run's base, prompted and distilled model the same.",
        description="Ask a run's base, prompted and distilled model the same, side by side.",
    )
    chat.add_argument("run", metavar="RUN", help="folder of the run")
    chat.add_argument("--message", help="ask this alone, in place of a conversation")
    chat.add_argument(
        "--context", dest="context_name", metavar="NAME", help="which, where the run has several"
    )
    _add_allow_code(chat)
    check = "Hold a run's scorecard, weights and data against its evidence.json and its answers."
    verify = commands.add_parser("verify", help=check, description=check)
    verify.add_argument("run", metavar="RUN", help="folder of the run")
    verify.add_argument(
        "--scorer", metavar="SPEC", default=argparse.SUPPRESS, help="in place of the one it names"
    )
    verify.add_argument("--json", action="store_true", help="print what was found, nothing else")
    _add_allow_code(verify)
    saves = "Measure on a server what a run's model saves against the prompt in the server's cache."
    serve = commands.add_parser("serve-report", help=saves, description=saves)
    serve.add_argument("run", metavar="RUN", help="folder of the run")
    serve.add_argument("--json", action="store_true", help="print what was found, nothing else")
    _add_allow_code(serve)
    _add_group(serve, "serving", Wanted, SERVING_FIELDS)
    init = commands.add_parser(
        "init",
        help="Write a small task that runs as it is.",
        description="Write a small task that runs as it is: context, prompts, data, config.yaml.",
    )
    init.add_argument("folder", metavar="FOLDER", help="a folder that is not there yet, or empty")
    return parser


def _add_contenders(parser: argparse.ArgumentParser) -> None:
    """Who else answers, and many runs side by side."""
    parser.add_argument(
        "--contender",
        action="append",
        default=[],
        metavar="NAME=WHAT",
        help="who answers as well: a model, the folder of an adapter or of a soft prompt, a prompt "
        "(.md, .txt, .json) for the base, a server's address; may be given several times",
    )
    parser.add_argument(
        "--base_url",
        metavar="URL",
        help="an OpenAI-compatible server that answers as well, such as http://127.0.0.1:8000/v1",
    )
    parser.add_argument(
        "--served_model", metavar="NAME", help="which model of that server, where it has several"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="RUN",
        help="print and draw the scorecards of these folders, and measure nothing",
    )


def _add_experience(commands: Any) -> None:
    """The command that reads a training run's fields, and its own."""
    summary = "Let a model distil what it learned from its own attempts, round by round."
    sub = commands.add_parser("experience", help=summary, description=summary)
    sub.add_argument("--config", metavar="FILE", help="YAML file with the fields below")
    sub.add_argument("--preset", metavar="NAME", help=f"settings to start from: {PRESET_HELP}")
    sub.add_argument(
        "--log",
        metavar="FILE",
        help='JSONL of conversations, each with its "outcome" if that is known, as a server leaves '
        "them: they take the place of attempts, for one round",
    )
    sub.add_argument("--resume", action="store_true", help="continue the loop in output_dir")
    _add_allow_code(sub)
    _add_group(sub, "experience", Experience, EXPERIENCE_FIELDS)
    _add_fields(sub, set(FIELDS) - set(ITS_OWN) - UNUSED)


def _add_allow_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow_code",
        action="store_true",
        help="run the Python functions that a file in a run's folder names; without it only those "
        "that the command line names, and those of a --config that lies in no run's folder",
    )


def _add_fields(parser: argparse.ArgumentParser, wanted: Container[str]) -> None:
    """Fields of the configuration, in their groups; as text, which `settings` reads."""
    for group, kind in GROUPS.items():
        names = [name for name, its in FIELDS.items() if its == group and name in wanted]
        if names:
            _add_group(parser, group, kind, {name: KINDS[name] for name in names})


def _add_group(
    parser: argparse.ArgumentParser, group: str, kind: type, fields: Mapping[str, Any]
) -> None:
    """Fields of one group, by name and kind."""
    from docstring_parser import parse_from_object

    described = parse_from_object(kind)
    options = parser.add_argument_group(group, described.short_description)
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in described.params}
    for name, its in fields.items():
        default = getattr(kind, name, None)
        shown = f" (default: {default})" if default not in (None, "") else ""
        switch: Any = {"nargs": "?", "const": "true"} if its is bool else {}
        options.add_argument(
            f"--{name}",
            metavar=_metavar(its),
            default=argparse.SUPPRESS,
            help=f"{texts[name]}{shown}".replace("%", "%%"),
            **switch,
        )


def _metavar(kind: Any) -> str:
    kinds = [k for k in get_args(kind) if k is not type(None)]
    if get_origin(kind) is not None and all(isinstance(k, str) for k in kinds):
        return f"{{{','.join(kinds)}}}"
    if type(None) in get_args(kind):
        kind = kinds[0]
    names = {str: "TEXT", int: "N", float: "X", bool: "BOOL", list[str]: "LIST"}
    return names.get(kind, "MAPPING")


def _underscored(word: str) -> str:
    """--learning-rate is --learning_rate."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
