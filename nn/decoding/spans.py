"""The spans that a pointer finds.  Shapes: B batch, H labels, T tokens."""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..heads.scores import CompactScores

CELLS_AT_ONCE = 1 << 22
"""Scores written out and searched together."""


@torch.no_grad()
def best_positive_cells(
    scores: Tensor | CompactScores, places: Tensor | None, type_of: NDArray, count: int, option: str
) -> tuple[NDArray, ...]:
    """Spans whose scores are above 0.

    Args:
        scores: `(B, H, T, T)`, in full or compact; only cells i <= j are spans.
        places: True where a token may be part of a span, `(B, T)`; None: everywhere.
        type_of: the type of each label, from 0 on, `(H,)`.
        count: keep this many spans of one type in a sentence, the best-scoring ones: an untrained model finds
            thousands.
        option: what the caller calls this limit.

    Returns:
        (group, start, end, label) of the spans, so ordered; a group is sentence * types + type.
    """
    batch, num_labels, length, _ = scores.shape
    num_types = int(type_of.max()) + 1
    together = max(1, CELLS_AT_ONCE // (num_labels * length * length))
    in_order = batch * num_types, length, length, num_labels
    found, crowded = [], False
    for first in range(0, batch, together):
        rows = slice(first, first + together)
        block = scores[rows] if isinstance(scores, Tensor) else scores.rows(rows).dense()
        sentence, label, start, end = cells = _positive_cells(block)
        seen = start <= end
        if places is not None:
            allowed = places[rows].cpu().numpy()
            seen &= allowed[sentence, start] & allowed[sentence, end]
        if not seen.all():
            sentence, label, start, end = cells = tuple(part[seen] for part in cells)
        group = (sentence + first) * num_types + type_of[label]
        if len(group) > count and np.bincount(group).max() > count:
            best = _best_cells(block, cells, group, count)
            group, start, end, label = group[best], start[best], end[best], label[best]
            crowded = True
        found.append(np.ravel_multi_index((group, start, end, label), in_order))
    if crowded:
        warnings.warn(
            f"more candidate spans of one type in a sentence than {option}={count}: the best-scoring ones are kept "
            "(usual in the first epochs)",
            stacklevel=4,
        )
    return np.unravel_index(np.sort(np.concatenate(found)), in_order)


@torch.no_grad()
def positive_spans(
    scores: Tensor | CompactScores, places: Tensor | None = None, max_spans: int = 100
) -> list[list[tuple[int, int, int]]]:
    """Spans of every sentence of a batch with a score above 0, as (label, first token, last token).

    Args:
        scores: `(B, H, T, T)`, in full or compact.
        places: True where a span may begin and end, `(B, T)`: special tokens and padding may not.
        max_spans: keep this many of one label in a sentence, the best-scoring ones.
    """
    num_labels = scores.shape[1]
    graph, start, end, label = best_positive_cells(scores, places, np.arange(num_labels), max_spans, "max_spans")
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(len(scores))]
    rows = zip((graph // num_labels).tolist(), label.tolist(), start.tolist(), end.tolist(), strict=True)
    for row, *span in rows:
        found[row].append((span[0], span[1], span[2]))
    return found


def _positive_cells(scores: Tensor) -> tuple[NDArray[np.int64], ...]:
    """Indices of the scores above 0, one array for each dimension."""
    if scores.device.type != "cpu":
        return tuple((scores > 0).nonzero().T.cpu().numpy())
    return np.unravel_index(np.flatnonzero(positive(scores)), scores.shape)


def positive(scores: Tensor) -> NDArray[np.bool_]:
    """Where the scores are above 0. NumPy finds out several times as fast as PyTorch, but has no bfloat16."""
    if scores.device.type != "cpu":
        return (scores > 0).cpu().numpy()
    return (scores.float() if scores.dtype == torch.bfloat16 else scores).numpy() > 0


def _best_cells(
    scores: Tensor, cells: tuple[NDArray[np.int64], ...], group: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """Which cells are the `count` best of their group."""
    cell = tuple(torch.from_numpy(part).to(scores.device) for part in cells)
    values = scores[cell].float()
    # Sorting all would take long; the best of a group are among the best of its matrices.
    seen = values.new_full(scores.shape, -torch.inf)
    seen[cell] = values
    lowest = seen.flatten(2).topk(min(count, seen[0, 0].numel()))[0][..., -1]
    chosen = np.flatnonzero((values >= lowest[cell[:2]]).cpu().numpy())
    group, score = group[chosen], values.cpu().numpy()[chosen]
    best_first = np.lexsort((-score, group))
    group = group[best_first]
    return chosen[best_first[np.arange(len(group)) - np.searchsorted(group, group) < count]]


def best_of(group: NDArray, scores: NDArray, count: int) -> NDArray:
    """Which are the `count` best of their group, in the order in which they stand."""
    best_first = np.lexsort((-scores, group))
    ordered = group[best_first]
    return np.sort(best_first[np.arange(len(ordered)) - np.searchsorted(ordered, ordered) < count])
