"""Between packed rows and one row for each sequence.

Shapes: S sequences, T tokens of the longest; R rows, L tokens of a row.  `starts` `(S, 2)` holds row and offset of each
sequence, `lengths` `(S,)` its number of tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .transformer import Transformer

log = logging.getLogger(__name__)


def encode(module: Transformer, batch: Mapping[str, Any]) -> Tensor:
    """Hidden states `(S, T, D)` of a padded batch, computed in packed rows where the batch says how.

    Attention that cannot be packed takes the padded rows as they are, and says so once.

    Args:
        module: the Transformer.
        batch: `ids` and `mask` `(S, T)`, `segments` where there are any, and for packed rows `starts` `(S, 2)`, as
            `data.packing` makes them.
    """
    ids, mask, segments, starts = batch["ids"], batch["mask"], batch.get("segments"), batch.get("starts")
    if starts is not None and module.config.why_not_packed:
        _say_once(f"rows are not packed: {module.config.why_not_packed}")
    if starts is None or module.config.why_not_packed:
        return module(ids, mask, segments)
    lengths = mask.sum(-1)
    shape = int(starts[:, 0].max()) + 1, int((starts[:, 1] + lengths).max())
    tokens = mask.cumsum(-1)  # 1, 2, ... within a sequence
    places = pack(tokens, starts, lengths, shape)
    positions = (places - 1).clamp(min=0)
    sequences = (places == 1).cumsum(-1) * (places > 0)
    if segments is not None:
        segments = pack(segments, starts, lengths, shape)
    hidden = module(pack(ids, starts, lengths, shape), None, segments, sequences=sequences, positions=positions)
    return unpack(hidden, starts, lengths)


@cache
def _say_once(text: str) -> None:
    log.warning(text)


def unpack(values: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Bring values of packed rows, `(R, L, ...)`, into one row for each sequence, `(S, T, ...)`, zero after its end."""
    cells, mask = _cells(starts, lengths, (values.shape[0], values.shape[1]))
    rows = values.flatten(0, 1).index_select(0, cells.flatten()).view(*cells.shape, *values.shape[2:])
    return rows.masked_fill_(_like(~mask, rows), 0)


def unpacked_mask(lengths: Tensor) -> Tensor:
    """Where `unpack` puts values, True, and where it fills up, `(S, T)`."""
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def pack(values: Tensor, starts: Tensor, lengths: Tensor, shape: tuple[int, int]) -> Tensor:
    """Bring values of one row for each sequence, `(S, T, ...)`, into packed rows `(R, L, ...)`, zero between them.

    The inverse of `unpack`, and the direction that gradients take through it; `shape` is `(R, L)`.
    """
    cells, mask = _cells(starts, lengths, shape)
    packed = values.new_zeros(shape[0] * shape[1], *values.shape[2:])
    real = values.masked_fill(_like(~mask, values), 0)
    return packed.index_add(0, cells.flatten(), real.flatten(0, 1)).view(*shape, *values.shape[2:])


def cumulative_lengths(sequences: Tensor) -> tuple[Tensor, int]:
    """Where sequences begin and end among the tokens without padding, for attention kernels of variable length.

    Args:
        sequences: number of the sequence that each token of a row belongs to, `(R, L)`; 0 is padding.

    Returns:
        `cu_seqlens`, int32 `(S + 1,)`: sequence i, counted row by row, is `tokens[cu_seqlens[i]:cu_seqlens[i + 1]]` of
        `tokens = values[sequences != 0]`; and the longest length.
    """
    real = sequences != 0
    begins = torch.ones_like(real)
    begins[:, 1:] = sequences[:, 1:] != sequences[:, :-1]
    first = begins[real].nonzero().flatten()
    borders = torch.cat((first, real.sum()[None])).int()
    return borders, int(borders.diff().max()) if len(first) else 0


def _cells(starts: Tensor, lengths: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """For each place of `(S, T)` its cell in the flattened rows, and whether it holds a token.

    A place after the end of a sequence points at whatever follows in the rows, not all of them at one cell: cells that
    many places read are slow to sum gradients into.
    """
    mask = unpacked_mask(lengths)
    first = starts[:, :1] * shape[1] + starts[:, 1:]
    cells = first + torch.arange(mask.shape[1], device=starts.device)
    return cells.clamp_(max=shape[0] * shape[1] - 1), mask


def _like(mask: Tensor, values: Tensor) -> Tensor:
    """A mask `(S, T)` with as many dimensions as `values`."""
    return mask.view(*mask.shape, *[1] * (values.ndim - 2))
