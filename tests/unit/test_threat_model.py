"""Each line of the threat model in docs/security.md names tests, and they exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def lines() -> list[list[str]]:
    """Return the cells of the table's lines, without its head and its headings."""
    page = (ROOT / "docs" / "security.md").read_text()
    section = page.partition("\n## Threat model\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows[2:]]
    return [row for row in cells if not row[0].startswith("**")]


def functions(path: str) -> set[str]:
    """Return the test functions of a file."""
    return {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_the_page_has_a_table_of_threats() -> None:
    assert len(lines()) > 25
    assert {len(cells) for cells in lines()} == {3}


@pytest.mark.parametrize("cells", lines(), ids=lambda cells: cells[0][:50])
def test_each_threat_is_stopped_by_something_and_names_tests_that_exist(cells: list[str]) -> None:
    threat, protection, tests = cells
    named = _TEST.findall(tests)

    assert threat
    assert protection
    assert named
    assert _TEST.sub("", tests).strip(", ") == ""  # nothing else is in the cell
    assert [f"{path}::{name}" for path, name in named if name not in functions(path)] == []
