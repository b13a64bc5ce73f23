"""The program `opcd`: runs a command, and says in words what a user can cause."""

import signal
import sys
import warnings
from collections.abc import Sequence

from opcd.errors import InputError
from opcd.runtime.console import any_console


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    0 done, 1 where what was looked at does not hold, 2 bad input, 3 where an alarm ended a run, 128
    + the signal's number where one did, before its model was made.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Of experts, which peft adapts by their parameters, under both names.
    warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys", module="peft")
    with any_console():
        return _reported(sys.argv[1:] if argv is None else list(argv))


def _reported(argv: list[str]) -> int:
    command = " ".join(["opcd", *(word for word in argv[:1] if not word.startswith("-"))])
    try:
        from opcd import arguments, commands

        return commands.run(arguments.parsed(argv))
    except InputError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\n{command}: interrupted", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)  # an `Ended` has its own
    except ModuleNotFoundError as error:
        hint = "install opcd-kernels with its extra [train], e.g. pip install -e '.[train]'"
        package = (error.name or str(error)).partition(".")[0]
        print(f"opcd: the command line needs {package}; {hint}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
