"""What runs the tests on a GPU: a process a file, and a report of all of them."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import on_gpu

PASSES = """
import pytest
@pytest.mark.gpu
def test_that_passes(): pass
def test_without_a_gpu(): assert False
"""
FAILS = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_that_fails(n): assert n == 2, "one is not two"
"""
CANNOT_BE_READ = "import no_such_package"
HAS_NONE = "def test_without_a_gpu(): assert False"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    for name, text in {
        "test_a": FAILS,
        "test_b": CANNOT_BE_READ,
        "test_c": HAS_NONE,
        "test_d": PASSES,
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_file_takes_another_along(folder: Path, capfd: pytest.CaptureFixture) -> None:
    assert on_gpu.main([".", "--junit", "all.xml"]) == 1
    cases = {
        case.get("name"): {child.tag for child in case}
        for case in ElementTree.parse(folder / "all.xml").iter("testcase")
    }
    assert cases == {
        "test_that_fails[1]": {"failure"},
        "test_that_fails[2]": set(),
        "test_b": {"error"},
        "test_that_passes": set(),
    }
    assert capfd.readouterr().out.endswith("failed: test_a.py, test_b.py\n")
    assert on_gpu.main(["test_d.py"]) == 0


def test_what_does_not_run_has_not_passed(folder: Path, capfd: pytest.CaptureFixture) -> None:
    (folder / "conftest.py").write_text("import no_such_package")
    assert on_gpu.main(["."]) == 1
    assert "no_such_package" in capfd.readouterr().out
    (folder / "conftest.py").write_text("")
    assert on_gpu.main(["nowhere"]) == 1


def test_what_only_a_gpu_can_show_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    *_, last = on_gpu.FIRST
    wanted = ["tests/opcd/runtime/test_upload.py", last, "tests/test_on_gpu.py"]
    assert on_gpu.files(wanted) == [last, "tests/opcd/runtime/test_upload.py"]
    assert all(Path(name).is_file() for name in on_gpu.FIRST)
