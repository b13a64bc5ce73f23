"""A process that checks completions, a JSON line each, until its input ends: see `checking`.

``python -m opcd.experience.check_worker SCORER SECONDS``
"""

import faulthandler
import json
import os
import sys
from typing import Any

from opcd.errors import InputError
from opcd.scoring.scorers import Scorer, load_scorer


def main() -> None:
    """Say that the scorer is loaded, or why not; then answer every line with one."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a checker prints is no answer
    spec, seconds = sys.argv[1], float(sys.argv[2])
    try:
        scorer = load_scorer(spec)
    except InputError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)
        return
    print("{}", file=answers, flush=True)
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            # Whoever started this kills it in time, and may have been killed itself; this ends it
            # even where a checker holds the interpreter.
            faulthandler.dump_traceback_later(2 * seconds + 1, exit=True, file=nowhere)
            found = _checked(scorer, json.loads(line))
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(found), file=answers, flush=True)


def _checked(scorer: Scorer, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"value": scorer(**asked).value}
    except InputError as error:  # what a user's function raised, or returned
        return {"error": str(error)}


if __name__ == "__main__":
    main()
