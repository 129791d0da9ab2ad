"""Masks of a language model: what is guessed is what stood there, the shares of runs and the budget are kept."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from kexue.errors import InputError
from kexue.nn.masking import Masking

SPECIAL = (0, 1, 2, 3, 4)
SHARES = (0.15, 0.20, 0.30, 0.20, 0.15)


def masking(**options: Any) -> Masking:
    return Masking(100, 4, SPECIAL, **options)


def sentence(length: int) -> np.ndarray:
    return np.concatenate([[2], np.arange(length) % 90 + 5, [3]])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_answers_are_the_original_tokens_for_every_length_of_runs(n: int) -> None:
    """Also after the first token of a run has been overwritten; seen tokens outside of runs are as they were."""
    rng, shares = np.random.default_rng(n), [0.0] * (n - 1) + [1.0]
    for _ in range(50):
        ids = sentence(60)
        kept = ids.copy()
        seen, targets = masking(run_shares=shares).mask(ids, rng)
        assert (ids == kept).all()
        assert (seen[~targets] == ids[~targets]).all()
        runs = np.split(np.flatnonzero(targets), np.flatnonzero(np.diff(np.flatnonzero(targets)) > 1) + 1)
        assert all(len(run) % n == 0 and len(run) for run in runs)


@pytest.mark.parametrize("length", [40, 126, 510])
def test_the_shares_of_runs_are_the_given_ones(length: int) -> None:
    """Whatever the budget; 20 targets at most, and the budget is used but for less than the longest run."""
    rng, chosen, counts = np.random.default_rng(0), masking(run_shares=SHARES), Counter[int]()
    budget = min(20, round(0.15 * length))
    for _ in range(4000):
        sizes = chosen.sizes(length, rng)
        assert budget - 5 < sizes.sum() <= budget
        counts.update(sizes.tolist())
    found = np.array([counts[n] for n in range(1, 6)]) / sum(counts.values())
    assert found == pytest.approx(SHARES, abs=0.02)


def test_single_tokens_use_the_whole_budget_and_80_10_10() -> None:
    rng, chosen, kinds = np.random.default_rng(1), masking(), Counter[str]()
    for _ in range(1000):
        ids = sentence(100)
        seen, targets = chosen.mask(ids, rng)
        assert targets.sum() == 15
        kinds["masked"] += int((seen[targets] == 4).sum())
        kinds["kept"] += int((seen[targets] == ids[targets]).sum())
        assert not np.isin(seen[targets & (seen != 4)], SPECIAL).any()
    total = 15000
    assert kinds["masked"] / total == pytest.approx(0.8, abs=0.01)
    assert kinds["kept"] / total == pytest.approx(0.1 + 0.1 / 95, abs=0.01)


@pytest.mark.parametrize("shares", [(1.0,), SHARES])
def test_every_place_has_the_same_chance_and_special_tokens_none(shares: tuple[float, ...]) -> None:
    rng, counts = np.random.default_rng(2), np.zeros(32)
    ids = sentence(30)
    ids[10] = 1  # an unknown token says nothing
    for _ in range(6000):
        counts += masking(run_shares=shares, rate=0.2).mask(ids, rng)[1]
    assert counts[[0, 10, 31]].sum() == 0
    # Runs of several tokens reach the ends less often, but the two ends alike.
    ordinary = np.delete(counts, [0, 10, 31])
    if len(shares) == 1:
        assert ordinary == pytest.approx(np.full(29, ordinary.mean()), rel=0.1)
    assert ordinary == pytest.approx(ordinary[::-1], rel=0.2)


def test_short_sentences_have_something_to_guess() -> None:
    rng = np.random.default_rng(3)
    for length in range(1, 12):
        targets = masking(run_shares=SHARES).mask(sentence(length), rng)[1]
        assert 1 <= targets.sum() <= max(1, round(0.15 * length))
    assert not masking().mask(np.array([2, 3]), rng)[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "use a rate between 0 and 1"),
        ({"max_targets": 0}, "1 or more"),
        ({"run_shares": (0.5, 0.4)}, "that sum to 1"),
        ({"run_shares": ()}, "that sum to 1"),
        ({"mask_id": 7}, "name it in special_ids"),
    ],
)
def test_wrong_values_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Masking(**{"vocab_size": 100, "mask_id": 4, "special_ids": SPECIAL, **options})
