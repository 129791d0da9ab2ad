"""The full matrix technique x base x module: every cell within its stated bound, every wrong variant found out.

`tests/support/matrix.py` states the rows, `python tests/support/write_matrix.py` writes what is measured to
docs/matrix.md.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from matrix import BASES, ROWS
from matrix_runs import SAVED_AT, changed, everything, measure, problems
from matrix_wrong import WRONG

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

CELLS = [(name, module, base) for name, row in ROWS.items() for module in row.modules for base in BASES]
WRONG_CELLS = [(name, module, base) for name, row in WRONG.items() for module in row.modules for base in BASES]
SINGLE = [name for name, row in ROWS.items() if len(row.parts) == 1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return everything(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("cell", CELLS, ids=" - ".join)
def test_cell(cell: tuple[str, str, str], runs: dict[Any, Any]) -> None:
    name, module, base = cell
    row = ROWS[name]
    assert problems(measure(runs, row, module, base), row, module, base) == []


@pytest.mark.parametrize("cell", WRONG_CELLS, ids=" - ".join)
def test_wrong_variant_is_found_out(cell: tuple[str, str, str], runs: dict[Any, Any]) -> None:
    """Where it is wrong; where it happens to be right, nothing else makes the comparison fail."""
    name, module, base = cell
    row = WRONG[name]
    found = problems(measure(runs, row, module, base), row, module, base)
    if base in row.caught:
        assert any(re.search(row.caught[base], problem) for problem in found), found
    else:
        assert found == []


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SINGLE)
def test_what_comes_or_goes_between_runs_is_named(name: str, base: str, runs: dict[Any, Any]) -> None:
    added, removed = changed(runs, name, base)
    kind = type(ROWS[name].build("kexue")[0]).__name__
    assert f"saved with techniques none, now {kind}: what came starts anew" in added.warning
    assert f"saved with techniques {kind}, now none: " in removed.warning
    assert "what went leaves its state unused" in removed.warning
    assert added.steps == removed.steps == SAVED_AT + 2
    if ROWS[name].like == "none":
        assert added.difference == removed.difference == 0
