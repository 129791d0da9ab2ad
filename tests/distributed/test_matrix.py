"""Every technique on every base: the same numbers, in float32 as exactly as the order of sums allows.

Two gloo processes train all cells of the matrix one after another; one process trains the single-device column. The
tolerances: bases with two processes differ from DDP by at most 1e-6 (clipping sums the gradient norm in another order;
without it, most cells are equal to the last bit), and from a single process by at most 2e-5, since the mean over a
batch is then summed in another order.
"""

from __future__ import annotations

from typing import Any

import pytest
from cells import BASES, TECHNIQUES, differences, run_all
from ranks import run_ranks

TOLERANCE = 1e-6
TOLERANCE_SINGLE = 2e-5
RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "scheduler": True},
    # 6 batches an epoch and windows of 4: the last window is partial. A norm of 0.3 bites in every step.
    "sgd_accumulate_4_clip": {"optimizer": "sgd", "accumulate": 4, "clip": 0.3},
    "sgd_accumulate_2": {"optimizer": "sgd", "accumulate": 2},
}
MODULES = ("plain", "shared", "bert")


def _cells() -> dict[Any, Any]:
    cells: dict[Any, Any] = {}
    for module in MODULES:
        for technique in TECHNIQUES if module == "plain" else ("none", "both"):
            for recipe, options in RECIPES.items():
                if module == "plain" or recipe != "sgd_accumulate_2":
                    cells[module, technique, recipe] = options
    return cells


CELLS = _cells()
KEYS = list(CELLS)


@pytest.fixture(scope="module")
def two_ranks() -> dict[Any, Any]:
    cells = {(base, *key): ((base, key[1], key[0]), options) for base in BASES for key, options in CELLS.items()}
    return run_ranks(run_all, 2, cells, timeout=800)[0]


@pytest.fixture(scope="module")
def one_rank() -> dict[Any, Any]:
    return run_ranks(run_all, 1, {key: (("single", key[1], key[0]), options) for key, options in CELLS.items()})[0]


@pytest.mark.parametrize("key", KEYS, ids="-".join)
@pytest.mark.parametrize("base", BASES[1:])
def test_zero_equals_ddp(base: str, key: tuple[str, str, str], two_ranks: dict[Any, Any]) -> None:
    losses, weights = differences(two_ranks[(base, *key)], two_ranks[("ddp", *key)])
    assert losses <= TOLERANCE
    assert weights <= TOLERANCE


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_two_processes_equal_one(key: tuple[str, ...], two_ranks: dict[Any, Any], one_rank: dict[Any, Any]) -> None:
    losses, weights = differences(two_ranks[("ddp", *key)], one_rank[key])
    assert losses <= TOLERANCE_SINGLE
    assert weights <= TOLERANCE_SINGLE


@pytest.mark.parametrize("base", BASES)
def test_the_last_digit_is_equal_where_the_order_of_sums_is(base: str, two_ranks: dict[Any, Any]) -> None:
    for module in MODULES[:2]:
        key = (module, "both", "adamw")
        assert differences(two_ranks[(base, *key)], two_ranks[("ddp", *key)]) == (0.0, 0.0)


@pytest.mark.parametrize("base", BASES)
def test_recomputation_changes_nothing(base: str, two_ranks: dict[Any, Any]) -> None:
    plain = two_ranks[base, "plain", "none", "adamw"]
    recomputed = two_ranks[base, "plain", "activation_checkpointing", "adamw"]
    assert differences(recomputed, plain) == (0.0, 0.0)


@pytest.mark.parametrize("base", BASES)
def test_lookahead_changes_the_path(base: str, two_ranks: dict[Any, Any]) -> None:
    """Guards the matrix against a technique that is not there at all."""
    plain = two_ranks[base, "plain", "none", "sgd_accumulate_2"]
    slowed = two_ranks[base, "plain", "lookahead", "sgd_accumulate_2"]
    assert differences(slowed, plain)[1] > 1e-4


@pytest.mark.parametrize("base", BASES)
def test_a_partial_window_steps_at_the_end_of_the_epoch(base: str, two_ranks: dict[Any, Any]) -> None:
    # 24 rows in batches of 4 are 6 batches an epoch: windows of 4 and of 2, two steps in each of 2 epochs.
    assert two_ranks[base, "plain", "none", "sgd_accumulate_4_clip"]["step"] == 4


def test_all_ranks_end_with_the_same_weights() -> None:
    cells = {base: ((base, "both", "shared"), {"dropout": 0.2}) for base in BASES}
    first, second = run_ranks(run_all, 2, cells)
    for base in BASES:
        assert differences(first[base], second[base]) == (0.0, 0.0)
