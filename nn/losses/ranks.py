"""Sums over all processes, for losses that are means over a whole batch however it is divided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise sum over all processes; without a process group, the values.

    The backward pass sums as well. A loss made of such sums is the same number on every process, and the mean of the
    processes' gradients, which DDP and ZeRO take, is its gradient: that of one process with the whole batch. Every
    process must therefore run the backward pass if one does.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return values
    return _Sum.apply(values)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient)
        return gradient
