"""The command line: `opcd train` and `opcd eval`."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from opcd.errors import InputError
from opcd.runtime.console import any_console

CONFIG_HELP = {
    "train": "YAML file with these fields.",
    "eval": "YAML file with these fields, such as a run's config.yaml; those of training may stand "
    "in it.",
}
SPINS = "5000"  # of a waiting thread; see `_let_waiting_threads_sleep`
BACKSLASH = (
    "\nA backslash in double quotes begins an escape in YAML; write the path with '/', or in "
    "single quotes"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 done, 2 bad input, 130 interrupted."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Of experts, which peft adapts by their parameters, under both names.
    warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys", module="peft")
    with any_console():
        return _reported(argv)


def _reported(argv: Sequence[str] | None) -> int:
    """Run a command; errors of the command line itself in words."""
    try:
        return _main(argv)
    except UnicodeDecodeError as error:
        print(f"opcd: --config must be a UTF-8 text file, got {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        hint = "install opcd-kernels with its extra [train], e.g. pip install -e '.[train]'"
        package = (error.name or str(error)).partition(".")[0]
        print(f"opcd: the command line needs {package}; {hint}", file=sys.stderr)
        return 2


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    command = arguments.subcommand
    values = arguments[command].as_dict()
    values.pop("config", None)
    _let_waiting_threads_sleep()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("opcd").setLevel(logging.INFO)
    try:
        _run(command, values)
    except InputError as error:
        print(f"opcd {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nopcd {command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _let_waiting_threads_sleep() -> None:
    """Before torch is imported: OpenMP's threads spin for some ten microseconds, then sleep.

    By default they spin for milliseconds at every small operation, and where another process keeps
    a core busy they take the time of those that they wait for. This is for libgomp, which torch's
    packages for Linux bring; what the user set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _run(command: str, values: dict[str, Any]) -> None:
    from transformers.utils import logging as transformers_logging

    from opcd.config import EvalConfig, TrainConfig
    from opcd.terminal import Terminal, show_evaluated, show_trained
    from opcd.training.evaluate import evaluate_run
    from opcd.training.run import train

    transformers_logging.disable_progress_bar()
    if command == "train":
        resume = values.pop("resume")
        config = TrainConfig(**values)
        with Terminal() as terminal:
            outcome = train(config, resume, terminal)
        show_trained(outcome, config)
    else:
        config = TrainConfig(**{f.name: values[f.name] for f in fields(EvalConfig)})
        with Terminal(finishes_steps=False) as terminal:
            folder, scored = evaluate_run(config, values["distilled"], values["save_to"], terminal)
        show_evaluated(folder, scored)


class _TrainingAlone(argparse.Action):
    """A field of training: in a run's file it may stand, as an argument of `opcd eval` it is wrong.

    Files do not call an action.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error(
            f"{self.option_strings[0]} is for training and does nothing in opcd eval; leave it out"
        )


def _parser() -> Any:  # jsonargparse's parser, imported here to keep `import opcd.cli` light
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    from opcd.config import EvalConfig, TrainConfig

    class Parser(ArgumentParser):
        def error(self, message: str, *rest: Any) -> None:
            escaped = "quoted scalar" in message and ("escape" in message or "hex" in message)
            hint = BACKSLASH if escaped else f"\n{self.prog} --help explains what may be given"
            self.exit(2, f"{self.prog}: {message}{hint}\n")

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="opcd",
        description="On-policy context distillation: a prompt into the weights.",
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(metavar="COMMAND", title="commands")
    for name, summary in (
        ("train", "Distil a context into a model, then score it on test data."),
        ("eval", "Score a distilled model against the base model, with and without the context."),
    ):
        sub = Parser(description=summary)
        sub.add_argument("--config", action=ActionConfigFile, help=CONFIG_HELP[name])
        if name == "train":
            sub.add_class_arguments(TrainConfig)
            sub.add_argument(
                "--resume", action="store_true", help="Continue the run in output_dir."
            )
        else:
            sub.add_class_arguments(EvalConfig)
            measuring = {field.name for field in fields(EvalConfig)}
            for field in fields(TrainConfig):
                if field.name not in measuring:
                    sub.add_argument(f"--{field.name}", action=_TrainingAlone)
            sub.add_argument(
                "--distilled",
                type=str,
                default=None,
                help="Model to score; default output_dir/final; none: only base and prompted.",
            )
            sub.add_argument(
                "--save_to",
                type=str,
                default=None,
                help="Folder for scorecard and report; default output_dir, or a new folder in it "
                "where something that is measured by is not as in training.",
            )
        commands.add_subcommand(name, sub, help=summary)
        sub.prog = f"opcd {name}"
    return parser


if __name__ == "__main__":
    sys.exit(main())
