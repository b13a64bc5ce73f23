"""What the teacher does on which architecture: the table in docs/teacher.md, and its proof.

python -m tests.opcd.test_support    writes the table
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opcd.models.head import head_of
from opcd.teacher import SharedPrefixTeacher
from tests.opcd.architectures import ARCHITECTURES, build
from tests.opcd.test_teacher import COMPLETIONS, PREFIX, PROMPTS, alone

DOCS = Path(__file__).parents[2] / "docs" / "teacher.md"
BEGIN, END = "<!-- support table: written by tests/opcd/test_support.py -->\n", "<!-- end -->\n"
HEADER = (
    "| architecture | sequences | attention on a CPU | max \\|Δh\\| | sdpa against eager |\n"
    "|---|---|---|---|---|\n"
)
# Splitting a linear recurrence into chunks elsewhere adds its terms in another order.
BAR = {"qwen3-next-hybrid": 1e-4}


def row(name: str) -> tuple[str, str, str, float, float | None]:
    """Mode, backend and both differences, relative to nothing: hidden states are of size 1 to 3."""
    model = build(name)
    scale = head_of(model).scale
    expected = alone(model) * scale
    teacher = SharedPrefixTeacher(model, PREFIX)
    found = difference(teacher.score(PROMPTS, COMPLETIONS).hidden, expected)
    noise = None
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")
        noise = difference(alone(model) * scale, expected)
    return name, teacher.plan.mode, teacher.plan.backend, found, noise


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def line(cells: tuple[str, str, str, float, float | None]) -> str:
    *words, found, noise = cells
    own = "eager only" if noise is None else f"{noise:.0e}"
    return f"| {' | '.join(words)} | {found:.0e} | {own} |\n"


def committed() -> dict[str, list[str]]:
    table = DOCS.read_text().split(BEGIN)[1].split(END)[0]
    rows = [[c.strip() for c in text.strip("|\n").split("|")] for text in table.splitlines()[2:]]
    return {cells[0]: cells for cells in rows}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_committed_table_is_what_the_code_does(name: str) -> None:
    _, mode, backend, found, noise = row(name)
    # The bar: not above the model's own difference between two exact attentions.
    assert found <= BAR.get(name, max(2 * (noise or 0), 5e-6))
    cells = committed()[name]
    assert cells[1:3] == [mode, backend], "write the table anew"
    for value, text in ((found, cells[3]), (noise, cells[4])):
        if value:
            assert abs(math.log10(value / float(text))) <= 1, "write the table anew"


def test_the_table_has_no_other_rows() -> None:
    assert list(committed()) == list(ARCHITECTURES)


if __name__ == "__main__":
    torch.set_num_threads(2)
    before, rest = DOCS.read_text().split(BEGIN)
    table = HEADER + "".join(line(row(name)) for name in ARCHITECTURES)
    DOCS.write_text(before + BEGIN + table + END + rest.split(END)[1])
