"""Which keys a query sees.  Shapes: B batch, T queries, S keys (the queries are the last T of them).

Every kind of mask of the project is made here, once per pass, and read by all layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Mask
from .packing import cumulative_lengths


def once(method: Callable[[Any], Any]) -> Any:
    """A property that is computed when first read (`functools.cached_property` takes a lock, which stops compilers)."""
    name = f"_{method.__name__}"

    def read(self: Any) -> Any:
        if not hasattr(self, name):
            setattr(self, name, method(self))
        return getattr(self, name)

    return property(read, doc=method.__doc__)


@dataclass(eq=False)
class Visibility:
    """Which keys each query sees.

    Attributes:
        num_queries: T.
        num_keys: S.
        device: where the pass is computed.
        causal: no key after the query is seen.
        keys: True where a key is real, `(B, S)`; None when all are.
        segments: cumulated segment numbers `(B, S)` of a prefix mask, else None.
        sequences: the number of the sequence that each place of a packed row belongs to, `(B, S)`, else None.
        nearest: with a memory: every query sees so many keys at most; 0 for no limit.
    """

    num_queries: int
    num_keys: int
    device: torch.device
    causal: bool = False
    keys: Tensor | None = None
    segments: Tensor | None = None
    sequences: Tensor | None = None
    nearest: int = 0

    @once
    def is_triangle(self) -> bool:
        """Whether the triangle below the diagonal says it all: fused kernels need no mask then."""
        others = (self.keys, self.segments, self.sequences)
        return self.causal and self.num_queries == self.num_keys and not self.nearest and all(o is None for o in others)

    @once
    def allowed(self) -> Tensor | None:
        """True where a query may see a key, broadcast to `(B, 1, T, S)`; None when all see all.

        A query that would see nothing (padding, a row without any token) sees all of the padding: a softmax over
        nothing is NaN in some kernels, and whatever masks the loss drops the gradients of such a place.
        """
        past, allowed = self.num_keys - self.num_queries, None
        if (self.causal and self.num_queries > 1) or self.nearest:
            place = torch.arange(self.num_keys, device=self.device)
            distance = place[past:, None] - place
            allowed = distance >= 0
            if self.nearest:
                allowed = allowed & (distance < self.nearest)
            allowed = allowed[None]
        if self.segments is not None:
            earlier = self.segments[:, None, :] <= self.segments[:, past:, None]
            allowed = earlier if allowed is None else allowed & earlier
        if self.sequences is not None:
            same = self.sequences[:, past:, None] == self.sequences[:, None, :]
            allowed = same if allowed is None else allowed & same
        elif self.keys is not None:
            keys = (self.keys | ~self.keys.any(-1, keepdim=True))[:, None, :]
            allowed = keys if allowed is None else allowed & keys
            if allowed.shape[1] > 1:  # padding on the left: the first queries see no real key
                allowed = allowed | ~allowed.any(-1, keepdim=True)
        return None if allowed is None else allowed[:, None]

    @once
    def runs(self) -> tuple[Tensor, int]:
        """Borders of the packed sequences among all places, row by row, and the longest; a row's padding is one too."""
        assert self.sequences is not None
        return cumulative_lengths(self.sequences + 1)

    @once
    def counts(self) -> Tensor:
        """How many keys each query sees, in float32, broadcast to `(B, 1, T, 1)`."""
        if self.is_triangle:
            return torch.arange(1, self.num_keys + 1, device=self.device, dtype=torch.float32)[None, None, :, None]
        if self.allowed is None:
            return torch.full((1, 1, 1, 1), float(self.num_keys), device=self.device)
        return self.allowed.sum(-1, keepdim=True, dtype=torch.float32)


def visibility(
    kind: Mask,
    num_queries: int,
    device: torch.device,
    *,
    past: int = 0,
    mask: Tensor | None = None,
    segments: Tensor | None = None,
    sequences: Tensor | None = None,
    nearest: int = 0,
) -> Visibility:
    """Say which keys the queries see.

    Args:
        kind: full, causal, or prefix: all of segment 0, and in segment 1 nothing after the query.
        num_queries: tokens of this pass, T.
        device: where the pass is computed.
        past: keys from earlier passes (cache or memory) before them.
        mask: 1 where a key is real, `(B, past + T)`.
        segments: segment numbers `(B, past + T)`, for a prefix mask.
        sequences: numbers of packed sequences `(B, T)`, 0 at padding.
        nearest: see at most so many keys.
    """
    cumulated = segments.cumsum(-1) if kind == "prefix" and segments is not None else None
    return Visibility(
        num_queries,
        past + num_queries,
        device,
        causal=kind == "causal",
        keys=None if mask is None or sequences is not None else mask.bool(),
        segments=cumulated,
        sequences=sequences,
        nearest=nearest,
    )
