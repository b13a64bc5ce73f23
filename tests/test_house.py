"""The house: which room may import which, and that its maps are true."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPCD = ROOT / "opcd"
README = (ROOT / "README.md").read_text(encoding="utf-8")
# From the ground up; a room may import what lies below it, and files of its own.
FLOORS = (
    {"errors", "opcd_kernels"},
    {"episodes"},
    {"runtime"},
    {"models"},
    {"config", "objective", "scoring"},
    {"passes"},
    {"rollouts", "starter", "student_loss", "tasks", "teacher"},
    {"evaluation"},
    {"preflight"},
    {"training"},
    {"experience", "serving", "studies"},
    {"arguments", "terminal"},
    {"api"},
    {"commands"},
    {"cli"},
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def room_of(file: Path) -> str:
    return file.relative_to(OPCD).parts[0].removesuffix(".py")


def files() -> list[Path]:
    package = {OPCD / "__init__.py", OPCD / "__main__.py"}
    return [f for f in sorted(OPCD.rglob("*.py")) if f not in package]


def imports(file: Path) -> set[str]:
    """The rooms that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their room"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "opcd":
                found.add(rest.partition(".")[0])
            elif package in ("opcd_kernels", "benchmarks", "tests"):
                found.add(package)
    return found


@pytest.mark.parametrize("file", files(), ids=lambda f: str(f.relative_to(OPCD)))
def test_imports_go_down(file: Path) -> None:
    room = room_of(file)
    for other in imports(file) - {room, ""}:
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{file} imports {other}, which is not below"


def test_opcd_meets_the_kernels_in_few_places() -> None:
    """The loss in `objective`, attention in `passes`."""
    meets = {room_of(f) for f in files() if "opcd_kernels" in imports(f)}
    assert meets == {"objective", "passes"}
    for file in (ROOT / "opcd_kernels").glob("*.py"):
        assert not imports(file) - {"opcd_kernels"}, f"{file} knows of the rest"


def test_rooms_are_on_floors_and_in_the_readme() -> None:
    rooms = {room_of(f) for f in files()}
    assert rooms == set(FLOOR_OF) - {"opcd_kernels"}
    for room in rooms:
        name = f"{room}/" if (OPCD / room).is_dir() else f"{room}.py"
        assert f"      {name} " in README, f"{name} is missing from the README's map"


def test_a_rooms_docstring_names_its_files() -> None:
    for init in [*OPCD.rglob("*/__init__.py"), ROOT / "opcd_kernels" / "__init__.py"]:
        text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        named = [line.split()[0] for line in text.splitlines()[2:] if line and line[0] != " "]
        there = [f.stem for f in init.parent.glob("*.py") if f != init]
        there += [inner.parent.name for inner in init.parent.glob("*/__init__.py")]
        assert sorted(named) == sorted(there), init


def test_importing_opcd_is_light() -> None:
    code = "import sys, opcd, opcd.cli; print(sys.modules.keys() & {'torch', 'transformers'})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"


def test_below_the_command_line_nobody_prints_or_owns_signals() -> None:
    for file in files():
        if room_of(file) in ("cli", "commands", "arguments", "terminal"):
            continue
        if file.stem in ("interrupts", "processes"):  # the latter ends what was started here
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Name) and called.id == "print":
                assert any(k.arg == "file" for k in node.keywords), f"{file} prints"
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            assert not names & {"signal", "argparse", "tqdm"}, file


def test_benchmarks_have_no_circle() -> None:
    """Each file of benchmarks/ can be put below those that import it."""
    below: dict[str, set[str]] = {}
    for file in (ROOT / "benchmarks").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        below[file.stem] = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks")
            for name in [
                *(node.module or "").split(".")[1:2],
                *(alias.name for alias in node.names if node.module == "benchmarks"),
            ]
        }
    while below:
        ground = {name for name, needs in below.items() if not needs & set(below)}
        assert ground, f"a circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in ground}


def test_the_readme_is_read_to_its_end() -> None:
    assert len(README.splitlines()) <= 200
