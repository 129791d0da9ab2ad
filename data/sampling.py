"""Which rows form a batch, on which process, in which order: a pure function of (seed, epoch, processes, process)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch.distributed as dist
from torch.utils.data import DistributedSampler, SequentialSampler

from ..errors import InputError

POOL_STEPS = 64
"""Rows of this many consecutive steps are sorted together: more makes batches of more equal lengths and less chance."""


class LengthBucketSampler(DistributedSampler, SequentialSampler):
    """Lists of row indices of similar length, one list a step, for a loader with `batch_size=None`.

    Every row comes exactly once an epoch over all processes, nothing is dropped or repeated, and all processes take the
    same number of steps: the rows are cut into steps x processes batches that differ by at most one row. The processes
    of one step get neighbours in length, so that none waits for another. By type it is a `DistributedSampler` and a
    `SequentialSampler`: so Lightning calls `set_epoch` and leaves it in place on several processes (the first) and
    under `overfit_batches` (the second), where it would put single rows for lists of them.

    Batches hold at most `batch_size` rows. The one exception is `batch_size=1` with a number of rows that the processes
    do not divide: then some hold two, since a row can neither be left out nor a process be left without one.

    Args:
        lengths: length of each row, in any unit.
        batch_size: most rows in a batch.
        shuffle: training: a new order each epoch. Otherwise all rows are sorted, the longest first.
        seed: of the order.
        num_replicas: number of processes; None asks torch.distributed when the sampler is used.
        rank: this process; None asks likewise.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:  # the parent's constructor would ask for the process group, which may not exist yet
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: use 1 or more")
        if (num_replicas is None) != (rank is None) or (rank is not None and not 0 <= rank < (num_replicas or 0)):
            raise InputError(
                f"LengthBucketSampler(num_replicas={num_replicas}, rank={rank}): give both, rank the smaller"
            )
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._given_world = None if rank is None or num_replicas is None else (num_replicas, rank)

    @property
    def num_replicas(self) -> int:
        """Number of processes."""
        return self._world()[0]

    @property
    def rank(self) -> int:
        """This process."""
        return self._world()[1]

    def __len__(self) -> int:
        """Number of batches of this (and of each other) process in an epoch."""
        rows, processes = len(self.lengths), self.num_replicas
        if rows < processes:
            raise InputError(
                f"{rows} rows do not suffice for {processes} processes; use trainer.devices={max(rows, 1)} or less"
            )
        return min(-(-rows // (processes * self.batch_size)), rows // processes)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this process in the epoch set by `set_epoch`."""
        rank, steps = self.rank, self._steps()
        for step in steps:
            yield step[rank].tolist()

    def _steps(self) -> list[list[np.ndarray]]:
        """All batches of the epoch, by step and process; the same on every process."""
        num_steps, processes, rows = len(self), self.num_replicas, len(self.lengths)
        small, num_larger = divmod(rows, num_steps * processes)
        sizes = np.full(num_steps * processes, small)
        sizes[:num_larger] += 1
        borders = np.cumsum(sizes)
        if not self.shuffle:
            batches = np.split(np.argsort(-self.lengths, kind="stable"), borders[:-1])
            return [batches[i : i + processes] for i in range(0, len(batches), processes)]
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(rows)
        pool_of_batch = np.arange(num_steps * processes) // (POOL_STEPS * processes)
        order = order[np.lexsort((self.lengths[order], np.repeat(pool_of_batch, sizes)))]
        batches = np.split(order, borders[:-1])
        deal = random.permuted(np.tile(np.arange(processes), (num_steps, 1)), axis=1)
        return [[batches[step * processes + i] for i in deal[step]] for step in random.permutation(num_steps)]

    def _world(self) -> tuple[int, int]:
        if self._given_world is not None:
            return self._given_world
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return 1, 0
