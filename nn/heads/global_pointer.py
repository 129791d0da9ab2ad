"""Scores for every span of a sentence.  Shapes: B batch, T tokens, D features, H heads, d head size.

`GlobalPointer` gives each head its own queries and keys: `2 (D + 1) d` parameters a head.  `EfficientGlobalPointer`
asks "is it a span?" once for all heads and adds "of which kind?" as a bias: `2 (2 d + 1)` parameters a head.

Source: https://kexue.fm/archives/8373, https://kexue.fm/archives/8877.  Checked against: the formulas written plainly,
cell by cell, in tests/nn/test_global_pointer.py.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..transformer import position_angles, rotate
from .scores import FactoredScores, ProductScores


class LecunLinear(nn.Linear):
    """Linear layer that starts with LeCun-normal weights and no bias (set inside its constructor, as ZeRO 3 needs)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_features))
        nn.init.zeros_(self.bias)


class _Pointer(nn.Module):
    """What both forms share: sizes, rotation and the cells that no span can take."""

    def __init__(self, dim: int, num_heads: int, head_size: int, rope: bool, triangular: bool) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_heads", num_heads), ("head_size", head_size)):
            if value < 1:
                raise InputError(f"{type(self).__name__}({name}={value}): use 1 or more")
        if rope and head_size % 2:
            raise InputError(f"{type(self).__name__}(head_size={head_size}, rope=True): use an even head_size")
        self.num_heads = num_heads
        self.head_size = head_size
        self.rope = rope
        self.triangular = triangular

    def match(self, query: Tensor, key: Tensor) -> Tensor:
        """Scaled inner products `(..., T, T)` of `(..., T, d)`, rotated by position where wanted."""
        if self.rope:
            angles = position_angles(query.shape[-2], self.head_size, query.device)
            query, key = rotate(query, angles), rotate(key, angles)
        return query / math.sqrt(self.head_size) @ key.transpose(-1, -2)

    def visible(self, length: int, mask: Tensor | None, device: torch.device) -> Tensor:
        """Which cells are spans, `(T, T)` or `(B, T, T)`: no padding, and none below the diagonal if triangular."""
        visible = torch.ones(length, length, dtype=torch.bool, device=device)
        if self.triangular:
            visible = visible.triu()
        if mask is not None:
            visible = visible & mask.bool()[:, :, None] & mask.bool()[:, None, :]
        return visible

    def hide(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Put the dtype's smallest value where scores `(B, T, T)` are of no span."""
        visible = self.visible(scores.shape[-1], mask, scores.device)
        return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


class GlobalPointer(_Pointer):
    """Score `s_a(i, j) = q_i . k_j / sqrt(d)` of span i..j under head a, with queries and keys of its own per head.

    Args:
        dim: width of the hidden states.
        num_heads: number of heads (labels).
        head_size: width of a query or key.
        rope: rotate queries and keys by position, so that scores know the length of a span.
        triangular: only cells with i <= j are spans.
    """

    def __init__(
        self, dim: int, num_heads: int, head_size: int = 64, rope: bool = True, triangular: bool = True
    ) -> None:
        super().__init__(dim, num_heads, head_size, rope, triangular)
        self.projection = LecunLinear(dim, num_heads * 2 * head_size)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores `(B, H, T, T)` of hidden states `(B, T, D)`; cells outside `mask` `(B, T)` get the dtype's minimum."""
        return self.compact(hidden, mask).dense()

    def compact(self, hidden: Tensor, mask: Tensor | None = None) -> ProductScores:
        """The same scores as queries and keys, `2 H T d` numbers a sentence in place of `H T^2`."""
        length, device = hidden.shape[-2], hidden.device
        pairs = self.projection(hidden).unflatten(-1, (self.num_heads, 2, self.head_size)).permute(0, 2, 3, 1, 4)
        angles = position_angles(length, self.head_size, device) if self.rope else None
        return ProductScores(pairs, self.visible(length, mask, device), angles, 1 / math.sqrt(self.head_size))


class EfficientGlobalPointer(_Pointer):
    """Score `s_a(i, j) = q_i . k_j / sqrt(d) + start_a(i) + end_a(j)`: one span score for all heads, a bias for each.

    With `p = W h`, q are the even and k the odd columns of p; the biases are `V p / 2` of the p before rotation, whose
    odd columns belong to the start and even columns to the end of a span.  Arguments as in `GlobalPointer`.
    """

    def __init__(
        self, dim: int, num_heads: int, head_size: int = 64, rope: bool = True, triangular: bool = True
    ) -> None:
        super().__init__(dim, num_heads, head_size, rope, triangular)
        self.projection = LecunLinear(dim, 2 * head_size)
        self.bias = LecunLinear(2 * head_size, 2 * num_heads)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores `(B, H, T, T)` of hidden states `(B, T, D)`; cells outside `mask` `(B, T)` get the dtype's minimum."""
        return self.compact(hidden, mask).dense()

    def compact(self, hidden: Tensor, mask: Tensor | None = None) -> FactoredScores:
        """The same scores before they are added up, `H T` in place of `H T^2` numbers a sentence."""
        pair = self.projection(hidden)
        shared = self.hide(self.match(pair[..., ::2], pair[..., 1::2]), mask)
        end, start = (self.bias(pair) / 2).transpose(1, 2).unflatten(1, (self.num_heads, 2)).unbind(2)
        return FactoredScores(shared, start, end)


HeadKind = Literal["efficient", "standard"]
HEADS: dict[str, type[EfficientGlobalPointer] | type[GlobalPointer]] = {
    "efficient": EfficientGlobalPointer,
    "standard": GlobalPointer,
}
"""The two forms by the names that configs use."""
