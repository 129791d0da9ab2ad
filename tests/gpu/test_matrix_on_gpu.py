"""The matrix technique x base x module on a GPU: the same rows and bounds as on CPUs, one process a cell."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from matrix import BASES, LOOSE, ROWS, UNION
from matrix_modules import MODULES
from matrix_runs import measure, plan, problems, run
from ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CELLS = [(name, module, base) for name, row in ROWS.items() for module in row.modules for base in BASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """All runs, by a process for each base and module, several at once."""
    folder = tmp_path_factory.mktemp("matrix")

    def some(place: tuple[str, str]) -> dict[Any, Any]:
        base, module = place
        return run_ranks(run, 1, plan(ROWS.values(), [base], folder, [module]), str(folder), timeout=900)[0]

    places = [(base, module) for module in MODULES for base in reversed(BASES)]
    # Workers inherit the environment: sums in a fixed order, on the GPU.
    os.environ |= {"KEXUE_TEST_ACCELERATOR": "gpu", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1)) as pool:
            parts = list(pool.map(some, places))
    finally:
        del os.environ["KEXUE_TEST_ACCELERATOR"], os.environ["CUBLAS_WORKSPACE_CONFIG"]
    found = {key: value for part in parts for key, value in part.items()}
    # What runs in one process keeps the form of what runs in several: a state for each.
    return {key: one if isinstance(one, str) else {**one, "state": [one["state"]]} for key, one in found.items()}


@pytest.mark.parametrize("cell", CELLS, ids=" - ".join)
def test_cell(cell: tuple[str, str, str], runs: dict[Any, Any]) -> None:
    name, module, base = cell
    # One process draws one mask: nothing sets it apart from a single device. Stage 3 multiplies by other kernels.
    row = replace(ROWS[name], apart=None, union=UNION, zero=LOOSE)
    assert problems(measure(runs, row, module, base), row, module, base) == []
