"""The most probable spans of a row.  Shapes: R rows, T tokens, W longest span, K spans."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import InputError

Spans = tuple[Tensor, Tensor, Tensor]
"""Scores, first and last token, each `(R, K)`, the best first; where a row has fewer spans, the score is -inf."""


@torch.no_grad()
def best_spans(first: Tensor, last: Tensor, places: Tensor, max_length: int, count: int = 1) -> Spans:
    """Spans whose first and last token have the highest sum of scores.

    Args:
        first: score of each token as the first, such as its log-probability, `(R, T)`.
        last: the same as the last.
        places: tokens at which a span may begin or end, `(R, T)`.
        max_length: most tokens of a span.
        count: spans of a row, K.

    Raises:
        InputError: a length or number below 1.
    """
    width = _width(max_length, count, first.shape[1])
    ends = F.pad(last.masked_fill(~places, -torch.inf), (0, width - 1), value=-torch.inf).unfold(1, width, 1)
    return _best(first.masked_fill(~places, -torch.inf)[:, :, None] + ends, count)


@torch.no_grad()
def best_pairs(scores: Tensor, places: Tensor, max_length: int, count: int = 1) -> Spans:
    """The same for scores of every pair of a first and a last token, `(R, T, T)`."""
    length = scores.shape[-1]
    width = _width(max_length, count, length)
    last = torch.arange(length, device=scores.device)[:, None] + torch.arange(width, device=scores.device)
    inside = last < length
    last = last.clamp(max=length - 1)
    band = scores.gather(2, last.expand(len(scores), length, width))
    allowed = inside & places[:, :, None] & places[:, last]
    return _best(band.masked_fill(~allowed, -torch.inf), count)


@torch.no_grad()
def likely_spans(
    first: Tensor,
    last: Tensor,
    places: Tensor,
    max_length: float,
    least: float = 0.1,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All spans whose first and last token are both probable.

    Args:
        first: probability of each token to be the first, `(R, T)`.
        last: the same to be the last.
        places: tokens at which a span may begin or end, `(R, T)`.
        max_length: most that the tokens of a span may be long together.
        least: what both probabilities are above.
        lengths: how long each token is, 1/2 or more, `(R, T)`; None: 1.

    Returns:
        Row, first token, last token and product of both probabilities of each span, by row and place.
    """
    lengths = torch.ones_like(first) if lengths is None else lengths
    width = min(first.shape[1], int(2 * max_length))
    total = F.pad(lengths.cumsum(1), (1, 0))
    last = last.masked_fill(~places, 0)
    padded = F.pad(torch.stack((last, total[:, 1:])), (0, width - 1))
    ends, until = padded.unfold(2, width, 1)
    likely = (first.masked_fill(~places, 0) > least)[:, :, None] & (ends > least)
    likely &= until - total[:, :-1, None] <= max_length
    row, start, more = likely.nonzero(as_tuple=True)
    return row, start, start + more, first[row, start] * ends[row, start, more]


def _width(max_length: int, count: int, length: int) -> int:
    for name, value in (("max_length", max_length), ("count", count)):
        if value < 1:
            raise InputError(f"best_spans({name}={value}): use 1 or more")
    return min(max_length, length)


def _best(band: Tensor, count: int) -> Spans:
    """Of scores by first token and length less one, `(R, T, W)`; of equal ones the earliest, then the shortest."""
    rows, length, width = band.shape
    flat = band.reshape(rows, length * width)
    scores, cells = flat.topk(min(count, flat.shape[1]), sorted=True)
    first = cells // width
    return scores, first, first + cells % width
