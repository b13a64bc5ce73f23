"""Prints the lowest version that pyproject.toml promises of each package, for pip.

python tests/versions.py            what `make test-oldest` installs: all but torch
python tests/versions.py --torch    torch as well, whose wheels take gigabytes
"""

import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
EXTRAS = ("train", "test")
TORCH = ("torch", "triton")


def lowest(text: str, torch: bool = False) -> list[str]:
    """``name==version`` of each requirement with a lower bound."""
    section = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    parts = [section[1] if section else ""]
    for extra in EXTRAS:
        found = re.search(rf"^{extra} = \[(.*?)\]$", text, re.S | re.M)
        parts.append(found[1] if found else "")
    bounds = re.findall(r'"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)', "".join(parts))
    return [f"{name}=={version}" for name, version in bounds if torch or name not in TORCH]


if __name__ == "__main__":
    print("\n".join(lowest(PYPROJECT.read_text(encoding="utf-8"), "--torch" in sys.argv)))
