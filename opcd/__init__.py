"""On-policy context distillation: move a long context into a model's weights, and prove it.

The public names, loaded when they are first used; see docs/python.md.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Checked": "opcd.preflight.check",
    "Distilled": "opcd.api.results",
    "Evaluated": "opcd.api.results",
    "InputError": "opcd.errors",
    "Served": "opcd.serving.report",
    "Stopped": "opcd.api.distill",
    "SharedPrefixTeacher": "opcd.teacher",
    "StudentLoss": "opcd.student_loss",
    "check": "opcd.api.distill",
    "distill": "opcd.api.distill",
    "evaluate": "opcd.api.distill",
    "serve_report": "opcd.api.serve",
}
__all__ = [
    "Checked",
    "Distilled",
    "Evaluated",
    "InputError",
    "Served",
    "SharedPrefixTeacher",
    "Stopped",
    "StudentLoss",
    "__version__",
    "check",
    "distill",
    "evaluate",
    "serve_report",
]

if TYPE_CHECKING:
    from opcd.api.distill import Stopped, check, distill, evaluate
    from opcd.api.results import Distilled, Evaluated
    from opcd.api.serve import serve_report
    from opcd.errors import InputError
    from opcd.preflight.check import Checked
    from opcd.serving.report import Served
    from opcd.student_loss import StudentLoss
    from opcd.teacher import SharedPrefixTeacher


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'opcd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
