"""What the command line takes: commands, their options, and what is said of others."""

import argparse
from collections.abc import Container, Mapping, Sequence
from typing import Any, NoReturn, get_args, get_origin

from opcd import __version__
from opcd.config.fields import FIELDS, GROUPS, MEASURING
from opcd.config.presets import PRESETS
from opcd.config.settings import KINDS
from opcd.errors import InputError, did_you_mean
from opcd.experience.settings import KINDS as EXPERIENCE_FIELDS
from opcd.experience.settings import REFUSED, Experience
from opcd.serving.wanted import KINDS as SERVING_FIELDS
from opcd.serving.wanted import Wanted

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
    return parser().parse_args([_underscored(word) for word in argv])


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
                raise InputError(f"{name} does nothing in {self.prog}; leave it out")
            raise InputError(
                f"there is no option {name}{did_you_mean(name, options)}; see {self.prog} --help"
            )
        return found, unknown


def parser() -> _Parser:
    """What reads a command line, and says what it may hold."""
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
    _add_fields(sub, set(FIELDS) - set(REFUSED))


def _add_allow_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow_code",
        action="store_true",
        help="run the Python functions that a configuration in a run's folder names; without it "
        "only those that the command line names",
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
