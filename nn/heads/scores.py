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

from ..transformer.positions import rotate

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

    def logsumexp_and_select(self, rows: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What `logsumexp` and `select` give."""
        return self.logsumexp(), self.select(rows, heads)


@dataclass(frozen=True)
class ProductScores:
    """Scores `scale query_a(i) . key_a(j)` of span i..j under head a, kept as queries and keys before their rotation.

    Sums over all cells go through the matrices a few at a time, forward and backward: at many heads, no tensor of all
    scores, nor of all rotated queries, is made, let alone kept.

    Attributes:
        pairs: queries and keys `(B, H, 2, T, d)`, in any order of memory, such as that of the layer they come from.
        visible: True where a cell can be a span, `(T, T)` or `(B, T, T)`; others are at the dtype's minimum.
        angles: by which queries and keys are rotated, `(T, d / 2)`; None: not at all.
        scale: factor of the inner products.
    """

    pairs: Tensor
    visible: Tensor
    angles: Tensor | None = None
    scale: float = 1.0

    @property
    def shape(self) -> torch.Size:
        """Shape of the full tensor, `(B, H, T, T)`."""
        return torch.Size((*self.pairs.shape[:2], self.pairs.shape[3], self.pairs.shape[3]))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of queries and keys."""
        return self.pairs.dtype

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.pairs.device

    def to(self, dtype: torch.dtype) -> "ProductScores":
        """The same scores in another precision."""
        return replace(self, pairs=self.pairs.to(dtype))

    def dense(self) -> Tensor:
        """The full tensor `(B, H, T, T)`."""
        return self._matrices(self.pairs, self.visible if self.visible.dim() == 2 else self.visible[:, None])

    def rows(self, part: slice) -> "ProductScores":
        """Some of the sentences."""
        visible = self.visible if self.visible.dim() == 2 else self.visible[part]
        return replace(self, pairs=self.pairs[part], visible=visible)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> Tensor:
        """All matrices of one sentence, `(H, T, T)`."""
        return self._matrices(self.pairs[row], self.visible if self.visible.dim() == 2 else self.visible[row])

    def select(self, rows: Tensor, heads: Tensor) -> Tensor:
        """Matrices `(K, T, T)` of the given sentences and heads, both `(K,)`."""
        return self._matrices(self.pairs[rows, heads], self.visible if self.visible.dim() == 2 else self.visible[rows])

    def cells(self, rows: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Scores of the given cells under all heads, `(K, H)`; sentences, first and second index are `(K,)`."""
        seen = self.visible[i, j] if self.visible.dim() == 2 else self.visible[rows, i, j]
        query, key = self.pairs[rows, :, 0, i], self.pairs[rows, :, 1, j]
        if self.angles is not None:
            query, key = rotate(query, self.angles[i, None]), rotate(key, self.angles[j, None])
        scores = (self.scale * query * key).sum(-1)
        return scores.masked_fill(~seen[:, None], torch.finfo(self.dtype).min)

    def logsumexp(self) -> Tensor:
        """Logarithm of the summed exponentials of each matrix, `(B, H)`."""
        nothing = torch.empty(0, dtype=torch.long, device=self.device)
        return self.logsumexp_and_select(nothing, nothing)[0]

    def logsumexp_and_select(self, rows: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
        """What `logsumexp` and `select` give, float32 at least, with one pass for the gradients of both."""
        precise = self.to(torch.promote_types(self.dtype, torch.float32))
        visible = self.visible if self.visible.dim() == 3 else self.visible.expand(len(self), -1, -1)
        with torch.autocast(self.device.type, enabled=False):
            found: Any = _SumsAndMatrices.apply(precise.pairs, visible, self.angles, self.scale, rows, heads)
        return found

    def _matrices(self, pairs: Tensor, visible: Tensor) -> Tensor:
        """Scores of pairs `(..., 2, T, d)` in their own precision, whatever autocast says."""
        with torch.autocast(pairs.device.type, enabled=False):
            turned = pairs if self.angles is None else rotate(pairs, self.angles)
            query, key = turned.unbind(-3)
            scores = (self.scale * query) @ key.transpose(-1, -2)
            return scores.masked_fill_(~visible, torch.finfo(pairs.dtype).min)


CompactScores = FactoredScores | ProductScores
"""What losses and decoders take in place of the full tensor."""


class _Turn:
    """Rotates and scales queries and keys: as complex numbers, in one pass, where `rotate` takes five."""

    def __init__(self, angles: Tensor | None, scale: float, pairs: Tensor) -> None:
        self.scale = scale
        self.phases: list[Tensor] | None = None
        if angles is not None:
            angles = angles.to(pairs.dtype)
            self.phases = [torch.polar(torch.full_like(angles, size), angles) for size in (scale, 1.0)]

    def __call__(self, vectors: Tensor, which: int) -> Tensor:
        """Queries (0) or keys (1) `(..., T, d)`, ready for the product."""
        if self.phases is None:
            return self.scale * vectors if which == 0 else vectors.contiguous()
        return _as_real(_as_complex(vectors) * self.phases[which])

    def back(self, gradients: Tensor, which: int) -> Tensor:
        """Gradients of what came in, from those of what came out."""
        if self.phases is None:
            return self.scale * gradients if which == 0 else gradients
        return _as_real(_as_complex(gradients) * self.phases[which].conj())


class _SumsAndMatrices(torch.autograd.Function):
    """`log sum_ij e^s(i, j)` of each matrix, `(B, H)`, and some matrices, `(K, T, T)`.

    The matrices are made again for the backward pass. What is kept are the queries and keys as they came.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pairs: Tensor,
        visible: Tensor,
        angles: Tensor | None,
        scale: float,
        rows: Tensor,
        heads: Tensor,
    ) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        turn = _Turn(angles, scale, pairs)
        values = pairs.new_empty(pairs.shape[:2])
        hidden = _hidden(visible, pairs.dtype)
        for part in _parts(pairs):
            query, key = (turn(pairs[part][:, :, which], which) for which in (0, 1))
            scores = (query @ key.transpose(-1, -2)).add_(hidden[part[0], None])
            largest = scores.flatten(2).amax(-1)
            sums = scores.sub_(largest[..., None, None]).clamp_(min=NOTHING).exp_().flatten(2).sum(-1)
            values[part] = largest + sums.log_()
        query, key = (turn(pairs[rows, heads, which], which) for which in (0, 1))
        chosen = (query @ key.transpose(1, 2)).masked_fill_(~visible[rows], torch.finfo(pairs.dtype).min)
        ctx.save_for_backward(pairs, visible, angles, rows, heads, values)
        ctx.scale = scale
        return values, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor, shares: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        pairs, visible, angles, rows, heads, values = ctx.saved_tensors
        gradients = torch.empty_like(pairs)
        turn, hidden, seen = _Turn(angles, ctx.scale, pairs), _hidden(visible, pairs.dtype), visible.to(pairs.dtype)
        with torch.autocast(pairs.device.type, enabled=False):
            for part in _parts(pairs):
                query, key = (turn(pairs[part][:, :, which], which) for which in (0, 1))
                scores = (query @ key.transpose(-1, -2)).add_(hidden[part[0], None])
                scores.sub_(values[part][..., None, None]).clamp_(min=NOTHING).exp_()
                scores.mul_(weights[part][..., None, None]).mul_(seen[part[0], None])
                gradients[part][:, :, 0] = turn.back(scores @ key, 0)
                gradients[part][:, :, 1] = turn.back(scores.transpose(-1, -2) @ query, 1)
            query, key = (turn(pairs[rows, heads, which], which) for which in (0, 1))
            shares = shares.masked_fill(~visible[rows], 0)
            chosen = turn.back(shares @ key, 0), turn.back(shares.transpose(1, 2) @ query, 1)
            gradients.index_put_((rows, heads), torch.stack(chosen, 1), accumulate=True)
        return gradients, None, None, None, None, None


def _as_complex(vectors: Tensor) -> Tensor:
    """Neighbours `(..., 2 n)` as the parts of complex numbers `(..., n)`."""
    return torch.view_as_complex(vectors.unflatten(-1, (-1, 2)))


def _as_real(numbers: Tensor) -> Tensor:
    return torch.view_as_real(numbers).flatten(-2)


def _hidden(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores: on a CPU some ten times as fast as filling by a mask."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def _parts(pairs: Tensor) -> Iterator[tuple[slice, slice]]:
    """Sentences and heads whose matrices are made together."""
    rows, heads, _, length, _ = pairs.shape
    if pairs.device.type != "cpu":
        yield slice(0, rows), slice(0, heads)
        return
    together = max(1, MATRICES_AT_ONCE // (length * length))
    for row in range(rows):
        for first in range(0, heads, together):
            yield slice(row, row + 1), slice(first, first + together)
