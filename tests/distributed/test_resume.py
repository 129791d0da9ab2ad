"""Resume is exact: 2+2 epochs equal 4, also from the middle of an epoch and of an accumulation window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cells import BASES, differences, run_all
from ranks import run_ranks

# Dropout, shuffling, a scheduler, Lookahead with k = 2 and recomputation: everything that holds state or draws numbers.
COMMON = {"dropout": 0.2, "shuffle": True, "scheduler": True}
RECIPES = {"adamw": {"optimizer": "adamw", **COMMON}, "accumulate": {"optimizer": "sgd", "accumulate": 4, **COMMON}}
# Batches after which the checkpoint is saved; 6 batches an epoch. 9 is inside an epoch and, with windows of 4, inside
# one; 8 is an odd number of steps with windows of 4, so inside Lookahead's cycle; 12 is the end of an epoch.
SAVED_AT = (8, 9, 12)


def _cells(base: str, folder: Path) -> dict[Any, Any]:
    cells: dict[Any, Any] = {}
    for recipe, options in RECIPES.items():
        cells[base, recipe, "four"] = ((base, "both"), {**options, "epochs": 4})
        path = str(folder / f"{base}-{recipe}.ckpt")
        cells[base, recipe, "two"] = ((base, "both"), {**options, "epochs": 2, "save": path})
        cells[base, recipe, "epochs"] = ((base, "both"), {**options, "epochs": 4, "resume": path})
        for at in SAVED_AT:
            path = str(folder / f"{base}-{recipe}-{at}.ckpt")
            # The run that saves is cut off there, as a lost job would be.
            steps = at if recipe == "adamw" else {8: 3, 9: 3, 12: 4}[at]
            saving = {**options, "epochs": 4, "save": path, "save_at_step": at, "max_steps": steps + 1}
            cells[base, recipe, f"save{at}"] = ((base, "both"), saving)
            cells[base, recipe, str(at)] = ((base, "both"), {**options, "epochs": 4, "resume": path})
    return cells


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("resume")
    two = {key: cell for base in BASES for key, cell in _cells(base, folder).items()}
    return {**run_ranks(run_all, 2, two, timeout=800)[0], **run_ranks(run_all, 1, _cells("single", folder))[0]}


@pytest.mark.parametrize("point", ["epochs", *map(str, SAVED_AT)])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("base", ["single", *BASES])
def test_resumed_equals_uninterrupted_bit_for_bit(base: str, recipe: str, point: str, runs: dict[Any, Any]) -> None:
    resumed, whole = runs[base, recipe, point], runs[base, recipe, "four"]
    assert differences(resumed, whole) == (0.0, 0.0)
    assert resumed["step"] == whole["step"]


@pytest.mark.parametrize("base", ["single", *BASES])
def test_no_batch_is_seen_twice(base: str, runs: dict[Any, Any]) -> None:
    assert len(runs[base, "adamw", "9"]["losses"]) == 24 - 9
    # The window that was open goes again from its first batch, number 6: its gradients were not saved.
    assert len(runs[base, "accumulate", "9"]["losses"]) == 24 - 6


@pytest.mark.parametrize("sampler", ["distributed", "random"])
@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_resume_in_the_right_order(persistent: bool, sampler: str, tmp_path: Path) -> None:
    workers = {"num_workers": 2, "persistent_workers": persistent}
    # The first sampler orders by epoch number, the second by a seed it draws from torch's generator.
    options = {"shuffle": sampler, "loader_options": workers, "dropout": 0.2, "epochs": 4}
    cells: dict[Any, Any] = {"whole": (("single",), options)}
    for at in (9, 12):
        path = str(tmp_path / f"{at}.ckpt")
        cells["save", at] = (("single",), {**options, "save": path, "save_at_step": at, "max_steps": at + 1})
        cells["resumed", at] = (("single",), {**options, "resume": path})
    runs = run_ranks(run_all, 1, cells)[0]
    for at in (9, 12):
        assert differences(runs["resumed", at], runs["whole"]) == (0.0, 0.0)
        assert len(runs["resumed", at]["losses"]) == 24 - at


def test_several_loaders_each_resume_at_their_own_place(tmp_path: Path) -> None:
    path = str(tmp_path / "mid.ckpt")
    options = {"shuffle": "random", "dropout": 0.2, "epochs": 3, "loaders": 2}
    cells: dict[Any, Any] = {
        "whole": (("single",), options),
        "save": (("single",), {**options, "save": path, "save_at_step": 9, "max_steps": 10}),
        "resumed": (("single",), {**options, "resume": path}),
    }
    runs = run_ranks(run_all, 1, cells)[0]
    assert len(runs["resumed"]["losses"]) == 18 - 9
    assert differences(runs["resumed"], runs["whole"]) == (0.0, 0.0)
