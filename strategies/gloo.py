"""What makes ZeRO fast on CPU processes: collectives that suit gloo, and an allocator that keeps its large buffers.

Measured on two processes with 80 MB of float32 (benchmarks/gloo.py, medians): gloo's own all-gather takes 77 ms, the
same by one broadcast per part 28 ms; its reduce-scatter 110 ms, by exchanged parts 74 ms.
"""

from __future__ import annotations

import ctypes
import importlib
import platform
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Work:
    """Several pending operations as one, with what is left to do when they are done."""

    def __init__(self, pending: Sequence[Any], finish: Any = None) -> None:
        self.pending, self.finish = list(pending), finish

    def is_completed(self) -> bool:
        """Tell whether nothing is pending; `wait` still has to be called."""
        return all(work.is_completed() for work in self.pending)

    def wait(self, *_: Any) -> bool:
        """Wait for all of them."""
        for work in self.pending:
            work.wait()
        self.pending = []
        finish, self.finish = self.finish, None
        if finish is not None:
            finish()
        return True


def all_gather_into_tensor(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> _Work | None:
    """Gather equal parts of all processes into one tensor, as `torch.distributed.all_gather_into_tensor` does."""
    parts = output_tensor.view(-1).chunk(dist.get_world_size(group))
    own = parts[dist.get_rank(group)]
    if own.data_ptr() != input_tensor.data_ptr():
        own.copy_(input_tensor.view(-1))
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    pending = [dist.broadcast(part, rank, group=group, async_op=True) for rank, part in zip(ranks, parts, strict=True)]
    work = _Work(pending)
    return work if async_op else _done(work)


def reduce_scatter_tensor(
    output_tensor: Tensor, input_tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Sum a tensor over all processes and keep this process' part, as `torch.distributed.reduce_scatter_tensor` does.

    Parts are exchanged and summed in the order of ranks, so every run sums alike.
    """
    if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
    world, own_rank = dist.get_world_size(group), dist.get_rank(group)
    parts = input_tensor.view(-1).chunk(world)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    received = [part if rank == own_rank else torch.empty_like(parts[own_rank]) for rank, part in enumerate(parts)]
    pending: list[Any] = []
    for rank, global_rank in enumerate(ranks):
        if rank != own_rank:
            pending.append(dist.isend(parts[rank], global_rank, group=group))
            pending.append(dist.irecv(received[rank], global_rank, group=group))

    def add() -> None:
        total = output_tensor.view(-1)
        summed = received[0] + received[1] if world > 1 else received[0]
        for part in received[2:]:
            summed += part
        total.copy_(summed.div_(world) if op == dist.ReduceOp.AVG else summed)

    work = _Work(pending, add)
    return work if async_op else _done(work)


def _done(work: _Work) -> None:
    work.wait()


def without_shared_memory() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce, which serves inference only and needs a compiler."""
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm` has torch itself by that name
    backend.build_shm_op = lambda: None


def suit_deepspeed() -> None:
    """Let DeepSpeed's process group use these collectives, and keep large buffers in this process.

    ZeRO makes and drops flat buffers as large as its part of the model in every step. By default the C library gives
    such blocks back to the kernel at once, and every page of the next one costs a fault.
    """
    from deepspeed.comm import comm

    backend: Any = comm.cdb
    backend.all_gather_function = all_gather_into_tensor
    backend.reduce_scatter_function = reduce_scatter_tensor
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
