"""What a Transformer remembers between passes: a cache for generation, and the memory of Transformer-XL.

Shapes: B batch, N heads, S keys seen so far, D features.
"""

import torch
from torch import Tensor

from ...errors import InputError


class GrowingTensor:
    """Rows appended at the second last dimension; room is doubled when it runs out, so a step copies only its own."""

    def __init__(self) -> None:
        self._room: Tensor | None = None
        self._used = 0

    def append(self, new: Tensor) -> Tensor:
        """Add `(..., T, D)` and return all so far, `(..., S, D)`: a view, valid until the next call."""
        needed = self._used + new.shape[-2]
        if self._room is None or self._room.shape[-2] < needed:
            room = new.new_empty(*new.shape[:-2], max(2 * needed, 64), new.shape[-1])
            if self._room is not None:
                room[..., : self._used, :] = self._room[..., : self._used, :]
            self._room = room
        self._room[..., self._used : needed, :] = new
        self._used = needed
        return self._room[..., :needed, :]

    def seen(self) -> Tensor | None:
        """All so far, `(..., S, D)`; None before the first."""
        return None if self._room is None else self._room[..., : self._used, :]

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self._room is not None:
            self._room = self._room[..., : self._used, :][rows]


class LayerCache:
    """What one layer keeps: keys and values, or the state of linear attention, and the source of cross-attention."""

    def __init__(self) -> None:
        self.keys = GrowingTensor()
        self.values = GrowingTensor()
        self.state: tuple[Tensor, ...] | None = None
        self.source: tuple[Tensor, Tensor] | None = None

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.keys.reorder(rows)
        self.values.reorder(rows)
        if self.state is not None:
            state = (part[rows] for part in self.state)
            self.state = type(self.state)(*state) if hasattr(self.state, "_fields") else tuple(state)
        if self.source is not None:
            self.source = (self.source[0][rows], self.source[1][rows])


class Cache:
    """The layers' caches and the mask of all tokens so far; give the same one to every pass of a generation.

    Generation only: passes with a cache make no graph for gradients.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.length = 0
        self.mask: Tensor | None = None

    def extend(self, batch: int, tokens: int, mask: Tensor | None) -> Tensor | None:
        """Count new tokens, and join their mask `(B, T)` to that of the earlier ones; return the whole one."""
        if torch.is_grad_enabled():
            raise InputError("a cache is for generation: call the module within torch.no_grad() or inference_mode()")
        past, self.length = self.length, self.length + tokens
        self.mask = _joined(self.mask, mask, batch, past, tokens)
        return self.mask

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order: beams, or the sequences that are not finished."""
        for layer in self.layers:
            layer.reorder(rows)
        if self.mask is not None:
            self.mask = self.mask[rows]


class Memory:
    """Hidden states of the last tokens, one tensor a layer, without gradients: segment recurrence of Transformer-XL.

    Give the same one to every pass over a stream; each pass reads it and replaces it.

    Args:
        length: how many tokens to keep.
        same_length: let every query see `length` keys at most, itself included, however many are remembered.
    """

    def __init__(self, length: int, same_length: bool = False) -> None:
        if length < same_length:
            raise InputError(f"Memory(length={length}, same_length={same_length}): use {int(same_length)} or more")
        self.length = length
        self.same_length = same_length
        self.states: list[Tensor] = []
        self.mask: Tensor | None = None

    @property
    def size(self) -> int:
        """How many tokens are remembered now."""
        return self.states[0].shape[1] if self.states else 0

    def update(self, inputs: list[Tensor], mask: Tensor | None = None) -> None:
        """Append the inputs of the layers, `(B, T, D)` each, and forget what is beyond `length`.

        Args:
            inputs: of each layer.
            mask: what `extend` returned before the pass.
        """
        before = self.states or [hidden[:, :0] for hidden in inputs]
        joined = (torch.cat((old, new), dim=1).detach() for old, new in zip(before, inputs, strict=True))
        self.states = [self._last(both) for both in joined]
        self.mask = None if mask is None else self._last(mask)

    def _last(self, tokens: Tensor) -> Tensor:
        return tokens[:, max(tokens.shape[1] - self.length, 0) :].contiguous()

    def extend(self, batch: int, tokens: int, mask: Tensor | None) -> Tensor | None:
        """The mask `(B, M + T)` of what is remembered and of new tokens, given the latter; None when all are real."""
        return _joined(self.mask, mask, batch, self.size, tokens)

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.states = [state[rows] for state in self.states]
        self.mask = None if self.mask is None else self.mask[rows]


def _joined(before: Tensor | None, new: Tensor | None, batch: int, past: int, tokens: int) -> Tensor | None:
    """The mask of earlier and new tokens, `(B, past + tokens)`; one that is None has only real ones."""
    known = new if before is None else before
    if known is None:
        return None
    parts = (before, past), (new, tokens)
    return torch.cat([known.new_ones(batch, n) if part is None else part for part, n in parts], dim=1).bool()
