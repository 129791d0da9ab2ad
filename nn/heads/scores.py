"""Span scores that are sums, kept as their parts.  Shapes: B batch, H heads, T tokens, K chosen matrices."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FactoredScores:
    """Scores `shared(i, j) + start_a(i) + end_a(j)` of span i..j under head a.

    The full tensor `(B, H, T, T)` is seldom needed: its exponentials are products, so sums over all cells are matrix
    products, and few heads of a sentence have anything to find.

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
