"""Where a run stands: its position in the data and its random numbers, so that it goes on as if never interrupted.

Lightning restores weights, optimisers and counters, but starts the data of a broken-off epoch again at its first batch.
Where other processes go on, or another batch size, `row_order` says which rows are left for them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from .row_order import Leg, Plan, entries, plan_of, rest, rows_per_step, same_steps


def random_state() -> dict[str, Any]:
    """Return the state of every random number generator of this process, as tensors and plain data."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the generator that other libraries draw from
    state = {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random number generator of this process where `random_state` found it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def another_random_state(state: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return the state of a process that was not there when `state` was taken: its own, and the same each time."""
    digest = hashlib.blake2b(state["torch"].numpy().tobytes() + str(rank).encode(), digest_size=4).digest()
    seed = int.from_bytes(digest, "big")
    kind, keys, position, has_gauss, cached = np.random.RandomState(seed).get_state()
    other = {
        "python": random.Random(seed).getstate(),
        "numpy": (kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)),  # type: ignore[union-attr]
        "torch": torch.Generator().manual_seed(seed).get_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        other["cuda"] = torch.Generator("cuda").manual_seed(seed).get_state()
    return other


class _Entries:
    """Entries of a sampler after the first `count`, which are drawn at the first use or when `start` is called."""

    def __init__(self, entries: Iterator[Any], count: int) -> None:
        self.entries, self.count = entries, count

    def start(self) -> None:
        for _ in range(self.count):
            next(self.entries, None)
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.start()
        return next(self.entries)


class _Resumed:
    """A sampler that leaves out its first entries, for as long as `count` is set, and gives `once` while that is."""

    def __init__(self, sampler: Any, count: int, once: Sequence[Any] | None) -> None:
        self.sampler = sampler
        self.count = count
        self.once = once
        self.entries: _Entries | None = None

    def __iter__(self) -> Iterator[Any]:
        self.entries = _Entries(iter(self.sampler if self.once is None else self.once), self.count)
        return self.entries

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampler"], name)


class Position:
    """The position of one process in its training data, shared by the strategy and the loader it wraps.

    Args:
        processes: Number of processes.
        rank: This one.

    Attributes:
        epoch_start: Random state when the current epoch's iterator was made (a shuffling sampler draws its seed there).
        before_fetch: Random state before the batch fetched last, when batches are fetched ahead of their use.
        fetched: Batches fetched in this epoch.
        persistent: Whether the loader keeps its worker processes from epoch to epoch.
        reused: Whether this epoch runs on workers of an earlier one: new workers draw a random number more.
        window: Batch index, random state and `before_fetch` at the start of the current accumulation window.
        plan: The order of the rows, see `row_order.plan_of`.
        legs: What was done of this epoch under other plans.
        offset: Lightning's count of batches in this epoch where the present plan took over.
        pending: What a checkpoint said, until the next epoch iterator takes it.
        rows: The rows that are left of the epoch in which the run goes on, where `legs` are not all of it.
        resumed_at: Lightning's count of batches at which the run goes on in the middle of an epoch.
    """

    def __init__(self, processes: int = 1, rank: int = 0) -> None:
        self.processes = processes
        self.rank = rank
        self.epoch_start: torch.Tensor | None = None
        self.before_fetch: torch.Tensor | None = None
        self.fetched = 0
        self.persistent = False
        self.reused = False
        self.window: dict[str, Any] | None = None
        self.plan: Plan | None = None
        self.legs: list[Leg] = []
        self.offset = 0
        self.pending: dict[str, Any] | None = None
        self.rows: list[int] | None = None
        self.resumed_at: int | None = None

    def start_window(self, batch_idx: int) -> None:
        """Note where a window of accumulated batches starts; its first batch is fetched already."""
        self.window = {
            "batches": batch_idx - self.offset,
            "random": random_state(),
            "before_fetch": self.before_fetch,
        }

    def state(self, batches: int, open_batches: int = 0) -> dict[str, Any]:
        """Describe the position after so many batches of this epoch, the last `open_batches` of them in a window whose
        step has not been taken: then the position is the start of the window."""
        if self.pending is not None:  # resumed, and nothing done yet
            return self.pending
        epoch = {"epoch_start": self.epoch_start, "reused": self.reused, "plan": self.plan, "legs": self.legs}
        if open_batches and self.window is not None:
            return {**self.window, **epoch}
        if not batches:
            epoch = {"epoch_start": None, "reused": self.persistent, "plan": None, "legs": []}
        return {
            "batches": batches - self.offset if batches else 0,
            "random": random_state(),
            "before_fetch": self.before_fetch if self.fetched > batches - self.offset else None,
            **epoch,
        }

    def go_on(self, loader: Any, saved: dict[str, Any]) -> str | None:
        """Take up the position that a checkpoint has saved, on a loader that may divide the rows in another way.

        Returns:
            What is not exact about it; None if every row of the epoch is still seen once.
        """
        self.pending = saved
        if saved["plan"] is None:  # at the start of an epoch
            return None
        inexact = None
        legs, skip = saved["legs"], saved["batches"]
        now = plan_of(loader, self.processes)
        if not same_steps(saved["plan"], now):
            leg = {key: saved[key] for key in ("plan", "batches", "epoch_start", "reused")}
            legs, skip = [*legs, leg], 0
        self.rows = rest(legs, loader, self.processes) if legs else None
        if legs and not self.rows:
            legs, self.rows = [], None
            before, after = rows_per_step(saved["plan"]), rows_per_step(now)
            if not (before and after):
                before, after = saved["plan"]["processes"], self.processes
            skip = saved["batches"] * before // after
            inexact = (
                "the order of the rows cannot be made again (a sampler or data set of its own, or other data), so each "
                f"process leaves out {skip} batches of this epoch, and some rows come twice or not at all"
            )
        at = skip
        if self.rows is not None:
            at = len(loader) - len(entries(loader, self.rows, self.processes, self.rank)) + skip
        self.resumed_at, self.offset = at, at - skip
        self.pending = {**saved, "batches": skip, "legs": legs}
        return inexact


def rewind(loops: dict[str, Any], done: int, batches: int) -> dict[str, Any]:
    """Return Lightning's loop counters with the training batches of this epoch set from `done` back to `batches`."""
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    back = done - batches
    total = {name: done_in_all - back for name, done_in_all in progress["total"].items()}
    total["completed"] = total["processed"]
    progress = {**progress, "total": total, "current": dict.fromkeys(progress["current"], batches)}
    return {**loops, "fit_loop": {**loops["fit_loop"], "epoch_loop.batch_progress": progress}}


def repeat_validation(loops: dict[str, Any]) -> dict[str, Any]:
    """Return Lightning's loop counters, taken in the middle of a validation, such that it starts again when resumed.

    Lightning goes back into a validation whose last batch was started and not processed, and would go on behind it.
    """
    key = "epoch_loop.val_loop.batch_progress"
    progress = loops["fit_loop"][key]
    before = progress["total"]["completed"] - progress["current"]["completed"]
    begun, done = ("ready", "started"), ("processed", "completed")
    total = {**dict.fromkeys(begun, before + 1), **dict.fromkeys(done, before)}
    current = {**dict.fromkeys(begun, 1), **dict.fromkeys(done, 0)}
    progress = {**progress, "total": total, "current": current, "is_last_batch": False}
    return {**loops, "fit_loop": {**loops["fit_loop"], key: progress}}


class ResumableLoader:
    """Any training loader, able to start in the middle of an epoch.

    The first batches are left out at the sampler where there is one, so that nothing is read twice; other iterables are
    read and dropped. With worker processes, random augmentation inside a worker does not repeat; order always does.
    """

    def __init__(self, loader: Any, position: Position) -> None:
        self.loader = loader
        self.position = position

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing happens before the first batch is asked for, when the sampler knows its epoch.
        position = self.position
        pending, position.pending = position.pending, None
        rows, position.rows = position.rows, None
        skip, after_first = 0, None
        if pending is None:
            position.legs, position.offset = [], 0
        else:
            if pending.get("validating"):  # the validation has run from there on, and drawn its numbers
                pending = {**pending, "random": random_state()}
            skip, position.legs = pending["batches"], pending["legs"]
            if pending["reused"]:
                iter(self.loader)  # starts the workers that the run had already
            set_random_state(pending["random"])
            if pending["epoch_start"] is not None:  # in the middle of an epoch: its order was drawn at its start
                torch.set_rng_state(pending["epoch_start"])
                if pending["before_fetch"] is not None:
                    after_first = pending["random"]
        position.persistent = bool(getattr(self.loader, "persistent_workers", False))
        position.reused = position.persistent and self.loader._iterator is not None
        position.epoch_start = torch.get_rng_state()
        position.plan = plan_of(self.loader, position.processes)
        position.fetched = skip
        iterator = self._start(skip, rows)
        if pending is not None and pending["epoch_start"] is not None:
            before = pending["before_fetch"]
            torch.set_rng_state(pending["random"]["torch"] if before is None else before)
        while True:
            position.before_fetch = torch.get_rng_state()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            position.fetched += 1
            if after_first is not None:
                set_random_state(after_first)
                after_first = None
            yield batch

    def _start(self, skip: int, rows: list[int] | None) -> Iterator[Any]:
        loader = self.loader
        if not skip and rows is None:
            return iter(loader)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, torch.utils.data.IterableDataset):
            # An iterator takes the loader's sampler when it is made; persistent workers keep theirs.
            holder, name = loader.__dict__, "sampler" if loader.batch_sampler is None else "batch_sampler"
            if loader._iterator is not None:
                holder, name = loader._iterator.__dict__, "_index_sampler"
            original = holder[name]
            position = self.position
            once = None if rows is None else entries(loader, rows, position.processes, position.rank)
            holder[name] = sampler = _Resumed(original, skip, once)
            try:
                iterator = iter(loader)
            finally:
                holder[name] = original
            # Now, not with the first batch: a shuffling sampler draws its seed with its first entry, and the random
            # state is that of the epoch's start only until this function returns.
            if sampler.entries is not None:
                sampler.entries.start()
            sampler.count, sampler.once = 0, None  # new persistent workers keep this sampler
            return iterator
        iterator = iter(loader)
        for _ in islice(iterator, skip):
            pass
        return iterator

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Tell Lightning that this loader can be resumed; the state itself, one per process, is the strategy's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do; see `state_dict`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)
