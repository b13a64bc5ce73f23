"""A process that checks completions: see `checking`.

``python -m opcd.experience.check_worker SCORER SECONDS``
"""

import sys
from typing import Any

from opcd.runtime.workers import Answering, serve
from opcd.scoring.scorers import load_scorer


def main() -> None:
    """Answer with how right a completion is."""
    spec, seconds = sys.argv[1], float(sys.argv[2])

    def load() -> Answering:
        scorer = load_scorer(spec)

        def value(asked: dict[str, Any]) -> dict[str, Any]:
            return {"value": scorer(**asked).value}

        return value

    serve(load, seconds)


if __name__ == "__main__":
    main()
