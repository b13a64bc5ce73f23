"""The command line: `opcd train` and `opcd eval`."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from opcd.errors import InputError
from opcd.runtime.console import any_console

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

    from opcd.config import TrainConfig
    from opcd.terminal import Terminal, show_evaluated, show_trained
    from opcd.training.run import evaluate_run, train

    transformers_logging.disable_progress_bar()
    if command == "train":
        resume = values.pop("resume")
        config = TrainConfig(**values)
        with Terminal() as terminal:
            outcome = train(config, resume, terminal)
        show_trained(outcome, config)
    else:
        distilled, save_to = values.pop("distilled"), values.pop("save_to")
        with Terminal(finishes_steps=False) as terminal:
            folder, found = evaluate_run(TrainConfig(**values), distilled, save_to, terminal)
        show_evaluated(folder, found)


def _parser() -> Any:  # jsonargparse's parser, imported here to keep `import opcd.cli` light
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    from opcd.config import TrainConfig

    class Parser(ArgumentParser):
        def error(self, message: str, *rest: Any) -> None:
            escaped = "quoted scalar" in message and ("escape" in message or "hex" in message)
            super().error(message + BACKSLASH if escaped else message, *rest)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(
        prog="opcd", description="On-policy context distillation: a prompt into the weights."
    )
    commands = parser.add_subcommands(metavar="COMMAND", title="commands")
    for name, summary in (
        ("train", "Distil a context into a model, then score it on test data."),
        ("eval", "Score a distilled model against the base model, with and without the context."),
    ):
        sub = Parser(description=summary)
        sub.add_argument("--config", action=ActionConfigFile, help="YAML file with these fields.")
        sub.add_class_arguments(TrainConfig)
        if name == "train":
            sub.add_argument(
                "--resume", action="store_true", help="Continue the run in output_dir."
            )
        else:
            sub.add_argument(
                "--distilled",
                type=str,
                default=None,
                help="Model to score; default output_dir/final; none: only base and prompted.",
            )
            sub.add_argument(
                "--save_to", type=str, default=None, help="Folder for the scorecard and report."
            )
        commands.add_subcommand(name, sub, help=summary)
    return parser


if __name__ == "__main__":
    sys.exit(main())
