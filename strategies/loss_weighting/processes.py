"""Sums over the processes of a run, which a run of one process does without."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """Return the sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def union(names: list[str]) -> list[str]:
    """Return the names of all processes, each once, in the order of the processes."""
    if world() == 1:
        return names
    gathered: list[list[str]] = [[] for _ in range(world())]
    dist.all_gather_object(gathered, names)
    return list(dict.fromkeys(name for own in gathered for name in own))
