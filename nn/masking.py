"""Which tokens a masked language model has to guess, and what it sees in their place.

Runs of n tokens are masked, n drawn from given shares. The runs lie anywhere in a sequence with equal chance, its ends
included, and no two overlap. Numbers are drawn until no run of the greatest n would fit into what is left of the
budget: whether one more is drawn hangs on those before it alone, so that the shares of n come out as they were given,
whatever the budget.

Source: BERT (arXiv 1810.04805) for the mix of [MASK], other tokens and the token itself; SpanBERT (arXiv 1907.10529)
for runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import InputError


@dataclass(frozen=True)
class Masking:
    """How to mask.

    Attributes:
        vocab_size: ids go from 0 to below it.
        mask_id: of [MASK].
        special_ids: tokens that are neither masked nor put in another's place.
        rate: share of the tokens to guess.
        max_targets: most tokens to guess in a sequence.
        run_shares: share of runs of 1, 2, ... tokens among all; (1,) masks single tokens.
        replaced: share of the tokens to guess that [MASK] stands for; half of the others are any token, half stay.

    Raises:
        InputError: a value out of range.
    """

    vocab_size: int
    mask_id: int
    special_ids: Sequence[int]
    rate: float = 0.15
    max_targets: int = 20
    run_shares: Sequence[float] = (1.0,)
    replaced: float = 0.8

    def __post_init__(self) -> None:
        shares = list(self.run_shares)
        if not 0 < self.rate < 1 or not 0 <= self.replaced <= 1 or self.max_targets < 1:
            raise InputError(
                f"Masking(rate={self.rate}, replaced={self.replaced}, max_targets={self.max_targets}): use a rate "
                "between 0 and 1, a share from 0 to 1, and 1 or more"
            )
        if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise InputError(f"Masking(run_shares={shares}): give shares of runs of 1, 2, ... tokens that sum to 1")
        if self.mask_id not in self.special_ids or len(set(self.special_ids)) >= self.vocab_size:
            raise InputError(f"Masking(mask_id={self.mask_id}): name it in special_ids, beside which there are others")

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        """All ids but the special ones."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids)

    def mask(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Mask one sequence.

        Args:
            ids: tokens (T,).
            rng: source of chance.

        Returns:
            What is seen (T,), and where there is something to guess (T,); `ids` there are the answers.
        """
        maskable = np.flatnonzero(~np.isin(ids, self.special_ids))
        targets = np.zeros(len(ids), dtype=bool)
        targets[maskable[self._runs(len(maskable), rng)]] = True
        seen, draw = ids.copy(), rng.random(len(ids))
        seen[targets & (draw < self.replaced)] = self.mask_id
        other = targets & (draw >= self.replaced) & (draw < (1 + self.replaced) / 2)
        seen[other] = rng.choice(self.ordinary_ids, int(other.sum()))
        return seen, targets

    def sizes(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths of the runs in a sequence of so many maskable tokens."""
        budget = min(self.max_targets, length, max(1, round(self.rate * length)))
        shares = np.asarray(self.run_shares[:budget], dtype=float)  # a shorter sequence has no room for longer runs
        if length == 0 or not shares.sum():
            return np.zeros(0, dtype=int)
        longest = int(np.flatnonzero(shares)[-1]) + 1
        drawn = 1 + rng.choice(len(shares), budget, p=shares / shares.sum())
        before = np.cumsum(drawn) - drawn
        return drawn[before + longest <= budget]

    def _runs(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Which of so many places are in runs, in order."""
        sizes = self.sizes(length, rng)
        total = int(sizes.sum())
        # Each run shrunk to one place: any choice of as many places is a choice of runs that do not overlap.
        places = np.sort(rng.choice(length - total + len(sizes), len(sizes), replace=False))
        starts = places + np.cumsum(sizes) - sizes - np.arange(len(sizes))
        runs = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        return np.concatenate(runs) if runs else np.zeros(0, dtype=int)
