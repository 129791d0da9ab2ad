"""Spans from separate scores of first and of last tokens.  Shapes: B batch, T tokens, H labels."""

import torch
from torch import Tensor


@torch.no_grad()
def pair_nearest(starts: Tensor, ends: Tensor) -> Tensor:
    """Pair each first token with the nearest last token that is not before it.

    Args:
        starts: True where a span may begin, `(B, T)` or `(B, T, H)`.
        ends: True where one may end, of the same shape.

    Returns:
        Rows (sentence, label, first token, last token), so ordered, `(N, 4)`; the label is 0 for `(B, T)`. A first
        token without a last one gives none.
    """
    if starts.dim() == 2:
        starts, ends = starts[..., None], ends[..., None]
    length = starts.shape[1]
    places = torch.arange(length, device=starts.device)[None, :, None]
    at = torch.where(ends, places, length)
    nearest = at.flip(1).cummin(1)[0].flip(1)  # the smallest place of an end from here on
    sentence, label, first = (starts & (nearest < length)).transpose(1, 2).nonzero().unbind(-1)
    return torch.stack((sentence, label, first, nearest[sentence, first, label]), -1)
