"""docs/faults.md: every number once, and every test it names is there to be collected."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NUMBERS = [*range(1, 37), *range(45, 49)]
TEXT = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
CELLS = [
    [cell.strip() for cell in line.strip("| \n").split(" | ")]
    for line in TEXT.splitlines()
    if re.match(r"\| \d+ \|", line)
]


def collected(path: Path) -> set[str]:
    """Names of the tests that pytest collects from a file of functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_number_stands_once_and_in_order() -> None:
    assert [int(cells[0]) for cells in CELLS] == NUMBERS


@pytest.mark.parametrize("cells", CELLS, ids=lambda cells: cells[0])
def test_a_row_says_what_happens_and_names_tests_that_are_there(cells: list[str]) -> None:
    number, fault, behaviour, held_by = cells
    assert fault and behaviour
    named = held_by.split("` `")
    assert named and held_by.startswith("`") and held_by.endswith("`")
    for test in (name.strip("`") for name in named):
        file, _, function = test.partition("::")
        path = ROOT / file
        assert path.is_file() and path.name.startswith("test_"), f"{number}: there is no {file}"
        assert function in collected(path), f"{number}: {file} has no {function}"


def test_all_tests_that_are_written_are_in_the_last_column() -> None:
    """A name elsewhere on the page would not be checked."""
    in_rows = sum(len(cells[3].split("` `")) for cells in CELLS)
    assert len(re.findall(r"tests/[\w/]+\.py::\w+", TEXT)) == in_rows
