"""The order of rows in an epoch, as plain data in a checkpoint: so that other processes can go on with what is left.

An interrupted epoch is a list of legs, each a plan (which loader, on how many processes) and the batches that every
process did under it. What is left after all legs is dealt to the processes that are there now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

Plan = dict[str, Any]
Leg = dict[str, Any]
"""A plan, the `batches` done under it, and `epoch_start`, `reused` of `resume.Position` for an order drawn there."""


def plan_of(loader: Any, processes: int) -> Plan:
    """Return plain data from which any process can make the order of rows of this epoch again.

    Its `kind` says how: "own" for a sampler that has `plan`, `rest` and `entries` (as kexue's `LengthBucketSampler`),
    "distributed" for torch's `DistributedSampler`, "alone" for a shuffling or a sequential loader of a single process,
    and "unknown" for everything else.

    Args:
        loader: The training loader of a process.
        processes: Number of processes.
    """
    unknown = {"kind": "unknown", "processes": processes, "batch": getattr(loader, "batch_size", None)}
    if not isinstance(loader, DataLoader):
        return unknown
    sampler, batches = loader.sampler, loader.batch_sampler
    if batches is None and all(hasattr(sampler, name) for name in ("plan", "rest", "entries")):
        own: Any = sampler
        return {"kind": "own", **own.plan()}
    if type(batches) is not BatchSampler:
        return unknown
    plan = {"processes": processes, "batch": batches.batch_size, "steps": len(batches)}
    if type(sampler) is DistributedSampler and sampler.num_replicas == processes:
        epoch = {"shuffle": sampler.shuffle, "seed": sampler.seed, "epoch": sampler.epoch}
        return {"kind": "distributed", **plan, "rows": len(sampler.dataset), **epoch}  # type: ignore[arg-type]
    shuffle = type(sampler) is RandomSampler
    if processes > 1 or not (shuffle or type(sampler) is SequentialSampler):
        return unknown
    if shuffle and (sampler.replacement or sampler.generator or sampler._num_samples or loader.generator):  # type: ignore[union-attr]
        return unknown
    return {"kind": "alone", **plan, "rows": len(sampler), "shuffle": shuffle}  # type: ignore[arg-type]


def rows_per_step(plan: Mapping[str, Any]) -> int:
    """Return the number of rows that all processes take in one batch each; 0 where the plan does not say."""
    return plan["processes"] * (plan["batch"] or 0)


def same_steps(plan: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two plans put the same rows into each step, whatever their processes."""
    if plan["kind"] == "unknown":
        return all(plan[key] == other[key] for key in ("kind", "processes", "batch"))
    divided = {"processes", "batch", "epoch"}
    rest, other_rest = ({key: value for key, value in p.items() if key not in divided} for p in (plan, other))
    return rest == other_rest and rows_per_step(plan) == rows_per_step(other)


def rest(legs: Sequence[Leg], loader: Any, processes: int) -> list[int] | None:
    """Return the rows of the epoch that no leg has seen, in their order; None where nobody can know them.

    Args:
        legs: From the start of the epoch on.
        loader: The loader that goes on, of the same data.
        processes: Number of processes now.
    """
    now = plan_of(loader, processes)
    rows: list[int] | None = None
    for leg in legs:
        plan, batches = leg["plan"], leg["batches"]
        known = plan["kind"] != "unknown" != now["kind"] and plan["rows"] == now["rows"]
        if not known or (plan["kind"] == "own") != (now["kind"] == "own"):
            return None
        if plan["kind"] == "own":
            rows = loader.sampler.rest(plan, batches, rows)
        else:
            rows = (_order(leg) if rows is None else rows)[rows_per_step(plan) * batches :]
    return rows


def entries(loader: Any, rows: Sequence[int], processes: int, rank: int) -> list[Any]:
    """Return what the loader's sampler gives to this process in an epoch of which only these rows are left: row
    numbers, batches of them for a loader that batches, or what a sampler of its own kind gives.

    As with `DistributedSampler`, some rows come twice where the processes do not divide their number.
    """
    plan = plan_of(loader, processes)
    if plan["kind"] == "own":
        return loader.sampler.entries(rows, plan)
    padded = [*rows, *(rows[i % len(rows)] for i in range(-len(rows) % processes))]
    own = padded[rank::processes]
    batches: Any = loader.batch_sampler
    return list(BatchSampler(own, batches.batch_size, batches.drop_last and len(own) >= batches.batch_size))


def _order(leg: Leg) -> list[int]:
    """Return all rows of an epoch in the order in which its processes see them, step by step."""
    plan = leg["plan"]
    if plan["kind"] == "distributed":
        # On one process the order is the same and nothing is added to make the processes' shares equal.
        options = {"num_replicas": 1, "rank": 0, "shuffle": plan["shuffle"], "seed": plan["seed"]}
        sampler = DistributedSampler(range(plan["rows"]), **options)  # type: ignore[arg-type]
        sampler.set_epoch(plan["epoch"])
        return list(sampler)
    if not plan["shuffle"]:
        return list(range(plan["rows"]))
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(leg["epoch_start"])
        if not leg["reused"]:
            torch.empty((), dtype=torch.int64).random_()  # a new iterator of a loader draws one number first
        return list(RandomSampler(range(plan["rows"])))
