"""Which rows form a batch, on which process, in which order: a pure function of (seed, epoch, processes, process)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    of one step get neighbours in length, so that none waits for another. A step holds the same rows on any number of
    processes, if processes x batch_size is the same: so a run can go on elsewhere (docs/checkpoints.md).

    By type it is a `DistributedSampler` and a `SequentialSampler`: so Lightning calls `set_epoch` and leaves it in
    place on several processes (the first) and under `overfit_batches` (the second), where it would put single rows for
    lists of them.

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
        return _num_steps(rows, processes, self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of this process in the epoch set by `set_epoch`."""
        rank = self.rank
        for step in self._steps(self.plan()):
            yield step[rank].tolist()

    # What a run needs that goes on in the middle of an epoch with other processes or another batch size

    def plan(self) -> dict[str, Any]:
        """Return plain data from which any process can make the batches of this epoch again."""
        return {
            "processes": self.num_replicas,
            "batch": self.batch_size,
            "rows": len(self.lengths),
            "steps": len(self),
            "shuffle": self.shuffle,
            "seed": self.seed,
            "epoch": self.epoch,
        }

    def rest(self, plan: Mapping[str, Any], batches: int, rows: Sequence[int] | None = None) -> list[int]:
        """Return the rows that are left when every process has done so many batches of a plan.

        Args:
            plan: of the epoch that was broken off.
            batches: of each process.
            rows: those that the plan was about; None: all.
        """
        return [int(row) for step in self._steps(plan, rows)[batches:] for batch in step for row in batch]

    def entries(self, rows: Sequence[int], plan: Mapping[str, Any]) -> list[list[int]]:
        """Return the batches of this process in an epoch of which only these rows are left."""
        if len(rows) < self.num_replicas:  # a process cannot be left without a batch
            rows = np.resize(np.asarray(rows), self.num_replicas).tolist()
        return [step[self.rank].tolist() for step in self._steps(plan, rows)]

    def _steps(self, plan: Mapping[str, Any], rows: Sequence[int] | None = None) -> list[list[np.ndarray]]:
        """All batches of an epoch, by step and process; the same on every process.

        Rows are cut into steps before those are cut into batches, and nothing is drawn for a process before the steps
        are known: so the steps hold the same rows on any number of processes, if processes x batch size is the same.
        """
        chosen = np.arange(len(self.lengths)) if rows is None else np.asarray(rows, dtype=np.int64)
        lengths, processes = self.lengths[chosen], plan["processes"]
        num_steps = _num_steps(len(chosen), processes, plan["batch"])
        if not plan["shuffle"]:
            steps = np.array_split(np.argsort(-lengths, kind="stable"), num_steps)
            return [np.array_split(chosen[step], processes) for step in steps]
        random = np.random.default_rng((plan["seed"], plan["epoch"]))
        order = random.permutation(len(chosen))
        sizes = [len(part) for part in np.array_split(order, num_steps)]
        pool = np.repeat(np.arange(num_steps) // POOL_STEPS, sizes)
        steps = np.array_split(order[np.lexsort((lengths[order], pool))], num_steps)
        steps = [steps[step] for step in random.permutation(num_steps)]
        deal = random.permuted(np.tile(np.arange(processes), (num_steps, 1)), axis=1)
        batches = [np.array_split(chosen[step], processes) for step in steps]
        return [[step[i] for i in own] for step, own in zip(batches, deal, strict=True)]

    def _world(self) -> tuple[int, int]:
        if self._given_world is not None:
            return self._given_world
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return 1, 0


def _num_steps(rows: int, processes: int, batch_size: int) -> int:
    return min(-(-rows // (processes * batch_size)), rows // processes)
