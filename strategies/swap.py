"""Exchange weights with a second set in place: what runs between two exchanges leaves no trace in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

PIECE = 1 << 18
"""Elements handled at a time: few enough for the cache, and for a copy of them beside a tensor that fills the memory
(ZeRO keeps all weights of a process in one)."""


def pieces(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk over two tensors of one shape in step, `PIECE` elements at a time where both are contiguous."""
    first, second = first.detach(), second.detach()
    if first.numel() <= PIECE or not (first.is_contiguous() and second.is_contiguous()):
        yield first, second
    else:
        yield from zip(first.view(-1).split(PIECE), second.view(-1).split(PIECE), strict=True)


@torch.no_grad()
def exchange(first: Iterable[Tensor], second: Iterable[Tensor]) -> None:
    """Exchange the contents of tensors pair by pair, bit for bit; done twice, everything is as before.

    Storage stays where it is, so that buckets, flat buffers and other views of it see the exchange. Memory: one piece.

    Args:
        first: Tensors, such as parameters or the flat partitions that ZeRO makes of them.
        second: As many of the same shapes, dtypes and devices.
    """
    for a, b in zip(first, second, strict=True):
        if a.dtype != b.dtype:
            raise ValueError(f"exchange(first, second): {a.dtype} and {b.dtype} do not hold each other's values.")
        for left, right in pieces(a, b):
            kept = left.clone()
            left.copy_(right)
            right.copy_(kept)


def exchange_state(optimizer: Optimizer, key: str) -> None:
    """Exchange every parameter of an optimiser with `state[parameter][key]`, where it has one.

    Under ZeRO these are the float32 partitions of this process, at every stage.
    """
    pairs = [(parameter, entry[key]) for parameter, entry in optimizer.state.items() if key in entry]
    exchange([parameter for parameter, _ in pairs], [other for _, other in pairs])
