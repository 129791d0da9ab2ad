"""Span scores kept as what they are made of.  Shapes: B batch, H heads, T tokens, K chosen matrices, d head size.

The full tensor `(B, H, T, T)` is seldom needed: a loss wants a sum over all cells of each matrix, and the few matrices
that have something to find.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MATRICES_AT_ONCE = 1 << 18
"""Cells of score matrices that are made together on a CPU: they stay in its cache."""
NOTHING = -80.0
"""e to this is nothing beside 1; further down, exponentials take several times as long on a CPU."""


@dataclass(frozen=True)
class FactoredScores:
    """Scores `shared(i, j) + start_a(i) + end_a(j)` of span i..j under head a.

    Their exponentials are products, so sums over all cells are matrix products.

    Attributes:
        shared: `(B, T, T)`, hidden cells at the dtype's minimum.
        start: `(B, H, T)`.
        end: `(B, H, T)`.
    """

    shared: Tensor
    start: Tensor
    end: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the full tensor, `(B, H, T, T)`."""
        return torch.Size((*self.start.shape, self.end.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parts."""
        return self.start.dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.start.device

    def rows(self, part: slice) -> "FactoredScores":
        """Some of the sentences."""
        return FactoredScores(self.shared[part], self.start[part], self.end[part])

    def to(self, dtype: torch.dtype) -> "FactoredScores":
        """The same scores in another precision."""
        return FactoredScores(self.shared.to(dtype), self.start.to(dtype), self.end.to(dtype))

    def dense(self) -> Tensor:
        """The full tensor `(B, H, T, T)`."""
        return (self.shared[:, None] + self.start[..., None]).add_(self.end[:, :, None, :])

    def __len__(self) -> int:
        return len(self.shared)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Tensor:
        """All matrices of one sentence, `(H, T, T)`."""
        return (self.shared[row] + self.start[row, :, :, None]).add_(self.end[row, :, None, :])

    def select(self, rows: Tensor, heads: Tensor) -> Tensor:
        """Matrices `(K, T, T)` of the given sentences and heads, both `(K,)`."""
        # A sentence is selected many times; index_select sums its gradients in a fixed order, indexing by [] does not.
        shared = self.shared.index_select(0, rows)
        return (shared + self.start[rows, heads, :, None]).add_(self.end[rows, heads, None, :])

    def cells(self, rows: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Scores of the given cells under all heads, `(K, H)`; sentences, first and second index are `(K,)`."""
        return self.shared[rows, i, j, None] + self.start[rows, :, i] + self.end[rows, :, j]

    def logsumexp(self) -> Tensor:
        """Logarithm of the summed exponentials of each matrix, `(B, H)`.

        Done in float64: the largest parts may stand in different cells, and its range still holds their product. Should
        a product be lost even so (parts some 600 apart), its matrix is written out in full.
        """
        parts = [part.double() for part in (self.shared.flatten(1), self.start, self.end)]
        largest = [part.detach().amax(-1, keepdim=True) for part in parts]
        shared, start, end = (torch.exp(part - most) for part, most in zip(parts, largest, strict=True))
        total = ((start @ shared.view(self.shared.shape)) * end).sum(-1)
        smallest = 1e-280  # below it, lost terms could count
        logs = total.clamp(min=smallest).log() + largest[0] + largest[1][..., 0] + largest[2][..., 0]
        rows, heads = (total < smallest).nonzero(as_tuple=True)
        if len(rows):
            logs = logs.index_put((rows, heads), self.select(rows, heads).double().flatten(1).logsumexp(-1))
        return logs.to(self.start.dtype)


@dataclass(frozen=True)
class ProductScores:
    """Scores `query_a(i) . key_a(j)` of span i..j under head a, kept as queries and keys.

    Sums over all cells go through the matrices a few at a time, forward and backward: at many heads, no tensor of all
    scores is made, let alone kept.

    Attributes:
        query: `(B, H, T, d)`.
        key: `(B, H, T, d)`.
        visible: True where a cell can be a span, `(T, T)` or `(B, T, T)`; others are at the dtype's minimum.
    """

    query: Tensor
    key: Tensor
    visible: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the full tensor, `(B, H, T, T)`."""
        return torch.Size((*self.query.shape[:-1], self.key.shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of queries and keys."""
        return self.query.dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.query.device

    def to(self, dtype: torch.dtype) -> "ProductScores":
        """The same scores in another precision."""
        return replace(self, query=self.query.to(dtype), key=self.key.to(dtype))

    def dense(self) -> Tensor:
        """The full tensor `(B, H, T, T)`."""
        visible = self.visible if self.visible.dim() == 2 else self.visible[:, None]
        return _matrices(self.query, self.key, visible)

    def rows(self, part: slice) -> "ProductScores":
        """Some of the sentences."""
        visible = self.visible if self.visible.dim() == 2 else self.visible[part]
        return ProductScores(self.query[part], self.key[part], visible)

    def __len__(self) -> int:
        return len(self.query)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Tensor:
        """All matrices of one sentence, `(H, T, T)`."""
        return _matrices(self.query[row], self.key[row], self.visible if self.visible.dim() == 2 else self.visible[row])

    def select(self, rows: Tensor, heads: Tensor) -> Tensor:
        """Matrices `(K, T, T)` of the given sentences and heads, both `(K,)`."""
        number = rows * self.shape[1] + heads
        query, key = (part.flatten(0, 1).index_select(0, number) for part in (self.query, self.key))
        return _matrices(query, key, self.visible if self.visible.dim() == 2 else self.visible[rows])

    def cells(self, rows: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Scores of the given cells under all heads, `(K, H)`; sentences, first and second index are `(K,)`."""
        seen = self.visible[i, j] if self.visible.dim() == 2 else self.visible[rows, i, j]
        scores = (self.query[rows, :, i] * self.key[rows, :, j]).sum(-1)
        return scores.masked_fill(~seen[:, None], torch.finfo(self.dtype).min)

    def logsumexp(self) -> Tensor:
        """Logarithm of the summed exponentials of each matrix, `(B, H)`."""
        batch, heads = self.shape[:2]
        visible = self.visible if self.visible.dim() == 3 else self.visible.expand(batch, -1, -1)
        value: Any = _LogSumExp.apply(self.query.flatten(0, 1), self.key.flatten(0, 1), visible)
        return value.view(batch, heads)


CompactScores = FactoredScores | ProductScores
"""What losses and decoders take in place of the full tensor."""


class _LogSumExp(torch.autograd.Function):
    """`log sum_ij e^(q_i . k_j)` of each matrix; the matrices are made again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, visible: Tensor) -> Tensor:  # type: ignore[override]
        values = query.new_empty(len(query))
        for part, rows in _parts(query, key, visible):
            scores = _matrices(query[part], key[part], visible[rows]).flatten(1)
            largest = scores.amax(-1)
            sums = scores.sub_(largest[:, None]).clamp_(min=NOTHING).exp_().sum(-1)
            torch.add(largest, sums.log_(), out=values[part])
        ctx.save_for_backward(query, key, visible, values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, visible, values = ctx.saved_tensors
        d_query, d_key = torch.empty_like(query), torch.empty_like(key)
        with torch.autocast(query.device.type, enabled=False):
            for part, rows in _parts(query, key, visible):
                shares = _matrices(query[part], key[part], visible[rows])
                shares.sub_(values[part, None, None]).clamp_(min=NOTHING).exp_().mul_(weights[part, None, None])
                shares.masked_fill_(~visible[rows], 0)
                torch.bmm(shares, key[part], out=d_query[part])
                torch.bmm(shares.transpose(1, 2), query[part], out=d_key[part])
        return d_query, d_key, None


def _matrices(query: Tensor, key: Tensor, visible: Tensor) -> Tensor:
    """Scores in the precision of queries and keys, whatever autocast says."""
    with torch.autocast(query.device.type, enabled=False):
        return (query @ key.transpose(-1, -2)).masked_fill_(~visible, torch.finfo(query.dtype).min)


def _parts(query: Tensor, key: Tensor, visible: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Matrices to make together, and for each the number of its sentence."""
    count, heads = len(query), len(query) // len(visible)
    together = max(1, MATRICES_AT_ONCE // (query.shape[1] * key.shape[1])) if query.device.type == "cpu" else count
    for first in range(0, count, together):
        part = slice(first, min(first + together, count))
        yield part, torch.arange(part.start, part.stop, device=query.device) // heads
