"""What a run saves on a server, from Python."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opcd.api.caller import as_found
from opcd.api.results import Distilled
from opcd.config.settings import code_of, converted_to, gather, refuse_code
from opcd.errors import InputError, did_you_mean
from opcd.runtime.interrupts import raised
from opcd.runtime.untrusted import check_run_folder
from opcd.serving.report import Served
from opcd.serving.serve import serve_report as run_report
from opcd.serving.wanted import KINDS, Wanted
from opcd.terminal import Silent, Terminal


def serve_report(
    run: str | Path | Distilled,
    *,
    allow_code: bool = False,
    quiet: bool = False,
    **wanted: Any,
) -> Served:
    """Measure on a server what a run's model saves against the prompt in the server's cache.

    allow_code: run the Python functions that the run's configuration names.
    quiet: print no progress.
    wanted: see `opcd serve-report --help`: `base_url` or `server_python`, `requests`, prices, ...

    Written into the run's folder too, as serving.json, and in its report and page. A server that is
    started is gone when this returns, or raises, Ctrl-C included. Raises InputError for whatever
    does not fit.
    """
    folder = run.folder if isinstance(run, Distilled) else Path(run).expanduser()
    if folder.is_dir():
        check_run_folder(folder)
    config = gather({}, folder / "config.yaml", caller="Python")
    if not allow_code:
        refuse_code(code_of(config), "opcd.serve_report", called=("scorer",))
    given = Wanted(**_converted(wanted))
    shows = Silent if quiet else Terminal
    with as_found(), shows(finishes_steps=False) as shown, raised():
        return run_report(folder, config, given, shown)


def _converted(wanted: Mapping[str, Any]) -> dict[str, Any]:
    for name in wanted:
        if name not in KINDS:
            raise InputError(f"there is no argument {name!r}{did_you_mean(name, KINDS)}")
    return {
        name: converted_to(KINDS[name], name, value, "Python") for name, value in wanted.items()
    }
