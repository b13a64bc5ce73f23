"""What commands set in the environment, when, and for whom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opcd.runtime import libraries
from opcd.serving.vllm import surroundings
from tests.conftest import in_groups

OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
PLAIN = {k: v for k, v in os.environ.items() if k not in OURS}


def test_a_library_call_sets_nothing() -> None:
    code = (
        "import os, opcd.cli, opcd.training.run\n"
        "assert 'GOMP_SPINCOUNT' not in os.environ\n"
        "assert 'ONEDNN_PRIMITIVE_CACHE_CAPACITY' not in os.environ\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=PLAIN)


def test_a_command_sets_them_before_torch_is_imported(settings: dict, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from opcd.runtime import libraries\n"
        "real = libraries.set_up_libraries\n"
        "def set_up():\n"
        "    assert 'torch' not in sys.modules\n"
        "    real()\n"
        "    print('chosen', libraries.chosen)\n"
        "libraries.set_up_libraries = set_up\n"
        "from opcd.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text(in_groups(settings | {"prompts": str(tmp_path / "none.jsonl")}))
    command = [sys.executable, "-c", code, "train", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=PLAIN, check=False)
    assert "'GOMP_SPINCOUNT': '5000'" in done.stdout, done.stderr
    assert "'ONEDNN_PRIMITIVE_CACHE_CAPACITY': '128'" in done.stdout
    assert "prompts must be a file" in done.stderr


@pytest.mark.parametrize(
    ("own", "expected"), [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_what_the_user_set_stays(
    own: dict, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", own)
    monkeypatch.setattr(libraries, "chosen", {})
    libraries.set_up_libraries()
    assert own.get("GOMP_SPINCOUNT") == expected
    assert "GOMP_SPINCOUNT" not in libraries.chosen


def test_a_server_is_started_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured as anybody would start it."""
    monkeypatch.setitem(libraries.chosen, "GOMP_SPINCOUNT", "5000")
    own = {"GOMP_SPINCOUNT": "5000", "OMP_NUM_THREADS": "2"}
    found = surroundings(own, tmp_path, "key")
    assert "GOMP_SPINCOUNT" not in found
    assert found["OMP_NUM_THREADS"] == "2"
