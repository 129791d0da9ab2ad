"""The core of the matrix technique x base x module: the same numbers, as exactly as the order of sums allows.

Two gloo processes train all cells one after another; one process trains the single-device column. Accumulation and
clipping are tried here; `test_matrix_full.py` has all techniques, pairs of them, and runs that are resumed. Bases with
two processes differ from DDP by at most 1e-6 (clipping sums the gradient norm in another order; without it, most cells
are equal to the last bit), and from a single process by at most 2e-5, since the mean over a batch is then summed in
another order.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cells import differences
from matrix import BASES, ROWS, UNION, ZERO
from matrix_runs import run
from matrix_wrong import WRONG
from ranks import run_ranks

TWO = BASES[1:]
# Masks of dropout follow the rows, so that they do not depend on how a batch is divided.
COMMON = {"row_dropout": 0.3, "epochs": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {**COMMON, "optimizer": "adamw", "scheduler": True},
    # 6 batches an epoch and windows of 4: the last window is partial. A norm of 0.3 bites in every step.
    "sgd_accumulate_4_clip": {**COMMON, "optimizer": "sgd", "accumulate": 4, "clip": 0.3},
    "sgd_accumulate_2": {**COMMON, "optimizer": "sgd", "accumulate": 2},
}
BOTH = "activation_checkpointing + lookahead"
NAMES = {"kexue": ("none", "activation_checkpointing", "lookahead", "ema", BOTH)}
NAMES |= dict.fromkeys(("shared", "bert"), ("none", BOTH))
CELLS = [
    (name, module, recipe)
    for module, names in NAMES.items()
    for name in names
    for recipe in RECIPES
    if module == "kexue" or recipe != "sgd_accumulate_2"
]


def _train(bases: tuple[str, ...], folder: Path) -> dict[Any, Any]:
    cells = {(name, module, base, recipe): RECIPES[recipe] for base in bases for name, module, recipe in CELLS}
    return run_ranks(run, len(bases[:2]), cells, str(folder), timeout=800)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("matrix")
    return _train(TWO, folder) | _train(BASES[:1], folder)


@pytest.mark.parametrize("cell", CELLS, ids=" - ".join)
@pytest.mark.parametrize("base", TWO[1:])
def test_zero_equals_ddp(base: str, cell: tuple[str, str, str], runs: dict[Any, Any]) -> None:
    name, module, recipe = cell
    assert max(differences(runs[name, module, base, recipe], runs[name, module, "ddp", recipe])) <= ZERO


@pytest.mark.parametrize("cell", CELLS, ids=" - ".join)
def test_two_processes_equal_one(cell: tuple[str, str, str], runs: dict[Any, Any]) -> None:
    name, module, recipe = cell
    assert max(differences(runs[name, module, "ddp", recipe], runs[name, module, "single", recipe])) <= UNION


@pytest.mark.parametrize("module", ["kexue", "shared"])
@pytest.mark.parametrize("base", TWO)
def test_the_last_digit_is_equal_where_the_order_of_sums_is(base: str, module: str, runs: dict[Any, Any]) -> None:
    assert differences(runs[BOTH, module, base, "adamw"], runs[BOTH, module, "ddp", "adamw"]) == (0.0, 0.0)


@pytest.mark.parametrize("base", TWO)
def test_recomputation_changes_nothing(base: str, runs: dict[Any, Any]) -> None:
    plain = runs["none", "kexue", base, "adamw"]
    assert differences(runs["activation_checkpointing", "kexue", base, "adamw"], plain) == (0.0, 0.0)


@pytest.mark.parametrize("name", ["lookahead", "ema"])
@pytest.mark.parametrize("base", BASES)
def test_other_techniques_end_elsewhere(base: str, name: str, runs: dict[Any, Any]) -> None:
    """Guards the matrix against a technique that is not there at all."""
    plain = runs["none", "kexue", base, "sgd_accumulate_2"]
    assert differences(runs[name, "kexue", base, "sgd_accumulate_2"], plain)[1] > 1e-4


@pytest.mark.parametrize("base", BASES)
def test_a_partial_window_steps_at_the_end_of_the_epoch(base: str, runs: dict[Any, Any]) -> None:
    # 24 rows in batches of 4 are 6 batches an epoch: windows of 4 and of 2, two steps in each of 2 epochs.
    assert runs["none", "kexue", base, "sgd_accumulate_4_clip"]["step"] == 4


@pytest.mark.parametrize("base", TWO)
def test_all_ranks_end_with_the_same_weights(base: str, runs: dict[Any, Any]) -> None:
    assert all(found["drift"] == 0 for key, found in runs.items() if key[2] == base)


def test_the_page_has_the_rows_that_there_are() -> None:
    text = (Path(__file__).parents[2] / "docs" / "matrix.md").read_text(encoding="utf-8")
    written = set(re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)) - {"---", "techniques", "technique", "wrong"}
    assert written == ROWS.keys() | WRONG.keys(), "run python tests/support/write_matrix.py"
