"""From span and link scores to events.  Shapes: B batch, H labels, T tokens, G graphs of N nodes.

A node is a positive cell of the argument scores: (event type, role, start, end), so one span in two roles is two nodes.
Two nodes of one type are linked when their first tokens and their last tokens are both linked; the events of a type are
the maximal cliques of its graph. Since nodes are distinct, no event's arguments are a subset of another's.

Source: https://kexue.fm/archives/8926.
"""

import warnings
from collections.abc import Sequence
from itertools import compress, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ..heads.scores import FactoredScores
from .cliques import MAX_NODES, batched_maximal_cliques

Span = tuple[str, int, int]
"""(role, first token, last token), the last one inclusive."""
DecodedEvent = tuple[str, tuple[Span, ...]]
"""(event type, arguments in the order of the text)."""
CELLS_AT_ONCE = 1 << 22
"""Scores written out and searched together."""


def decode_events(
    argument_scores: Tensor,
    head_scores: Tensor,
    tail_scores: Tensor,
    labels: Sequence[Sequence[str]],
    max_nodes: int = 30,
    required_role: str | None = None,
) -> list[DecodedEvent]:
    """Events of one sentence: `decode_event_batch` for scores `(H, T, T)`, `(T, T)` and `(T, T)`."""
    scores = argument_scores[None], head_scores[None], tail_scores[None]
    return decode_event_batch(*scores, labels, max_nodes=max_nodes, required_role=required_role)[0]


@torch.no_grad()
def decode_event_batch(
    argument_scores: Tensor | FactoredScores,
    head_scores: Tensor,
    tail_scores: Tensor,
    labels: Sequence[Sequence[str]],
    places: Tensor | None = None,
    *,
    max_nodes: int = 30,
    max_events: int = 1000,
    required_role: str | None = None,
) -> list[list[DecodedEvent]]:
    """Events of every sentence of a batch; a cell counts when its score is above 0.

    Args:
        argument_scores: `(B, H, T, T)`, in full or factored.
        head_scores: scores `(B, T, T)` that two first tokens belong to one event; only cells i <= j are read.
        tail_scores: the same for last tokens.
        labels: (event type, role) of each of the H labels.
        places: True where a token may be part of an argument, `(B, T)`: special tokens and padding may not.
        max_nodes: keep this many arguments of one event type in a sentence, the best-scoring ones; at most 64. An
            untrained model finds thousands.
        max_events: give at most this many events of one type in a sentence.
        required_role: drop events without an argument of this role (the trigger, for instance).

    Raises:
        InputError: `max_nodes` out of range, or not as many labels as scores.
    """
    if not 1 <= max_nodes <= MAX_NODES:
        raise InputError(f"decode_events(max_nodes={max_nodes}): use 1 to {MAX_NODES}")
    if len(labels) != argument_scores.shape[1]:
        raise InputError(f"decode_events: {len(labels)} labels for scores of {argument_scores.shape[1]} labels")
    types = list(dict.fromkeys(event_type for event_type, _ in labels))
    type_of = np.array([types.index(event_type) for event_type, _ in labels])
    graph, start, end, label = _nodes(argument_scores, places, type_of, max_nodes)
    if not len(graph):
        return [[] for _ in range(len(argument_scores))]

    sizes = np.bincount(graph)
    present = np.flatnonzero(sizes)
    sizes = sizes[present]
    first = np.cumsum(sizes) - sizes  # the nodes of a graph are neighbours in the list
    sentence, kind = np.divmod(present, len(types))
    adjacency = _adjacency(head_scores, tail_scores, sentence, start, end, first, sizes)
    owner, members, ends = batched_maximal_cliques(adjacency, sizes, cap=max_events)
    lengths = ends.copy()
    lengths[1:] -= ends[:-1]
    members += np.repeat(first[owner], lengths)

    roles = [role for _, role in labels]
    spans = zip(map(roles.__getitem__, label.tolist()), start.tolist(), end.tolist(), strict=True)
    # Tuples of plain values, slices of one: thousands of lists would keep Python's garbage collector busy.
    chosen = tuple(np.fromiter(spans, dtype=object, count=len(label)).take(members).tolist())
    borders = [0, *ends.tolist()]
    arguments = [chosen[begin:stop] for begin, stop in pairwise(borders)]
    events = list(zip(map(types.__getitem__, kind[owner].tolist()), arguments, strict=True))
    sentence = sentence[owner]
    if required_role is not None:
        wanted = np.array([role == required_role for role in roles])[label]
        kept = np.logical_or.reduceat(wanted[members], borders[:-1])
        events, sentence = list(compress(events, kept)), sentence[kept]
    borders = np.searchsorted(sentence, np.arange(len(argument_scores) + 1)).tolist()
    return [events[begin:stop] for begin, stop in pairwise(borders)]


def _nodes(
    scores: Tensor | FactoredScores, places: Tensor | None, type_of: NDArray, max_nodes: int
) -> tuple[NDArray, ...]:
    """(graph, start, end, label) of the arguments, so ordered; a graph is sentence * types + type."""
    batch, num_labels, length, _ = scores.shape
    num_types = int(type_of.max()) + 1
    cells, values = _positive_cells(scores, places, limit=max_nodes * num_types)
    sentence, label, start, end = np.unravel_index(cells, tuple(scores.shape))
    graph = sentence * num_types + type_of[label]
    shape = (batch * num_types, length, length, num_labels)
    order = np.ravel_multi_index((graph, start, end, label), shape)
    if len(graph) and np.bincount(graph).max() > max_nodes:
        warnings.warn(
            "more candidate arguments of one event type in a sentence than max_nodes: the best-scoring ones are kept "
            "(usual in the first epochs)",
            stacklevel=3,
        )
        best_first = np.lexsort((-values, graph))
        graph = graph[best_first]
        order = order[best_first][np.arange(len(graph)) - np.searchsorted(graph, graph) < max_nodes]
    return np.unravel_index(np.sort(order), shape)


def _positive_cells(
    scores: Tensor | FactoredScores, places: Tensor | None, limit: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Flat positions of the scores above 0 and these scores, at most `limit` of a sentence: more cannot survive."""
    batch, num_labels, length, _ = scores.shape
    size = num_labels * length * length
    columns: list[Tensor] = []
    values: list[Tensor] = []
    together = max(1, CELLS_AT_ONCE // size)
    for rows in (slice(first, first + together) for first in range(0, batch, together)):
        if isinstance(scores, FactoredScores):
            block = FactoredScores(scores.shared[rows], scores.start[rows], scores.end[rows]).dense()
        else:
            block = scores[rows]
        positive = (block > 0).triu_()
        if places is not None:
            positive &= (places[rows, :, None] & places[rows, None, :])[:, None]
        cells = positive.flatten().nonzero()[:, 0]
        value = block.flatten()[cells]
        if len(cells) > limit and max(counts := torch.bincount(cells // size, minlength=len(block)).tolist()) > limit:
            best = [part.topk(min(limit, len(part)))[1] for part in value.split(counts)]
            cells = torch.cat([part[chosen] for part, chosen in zip(cells.split(counts), best, strict=True)])
            value = torch.cat([part[chosen] for part, chosen in zip(value.split(counts), best, strict=True)])
        columns.append(cells + rows.start * size)
        values.append(value)
    return torch.cat(columns).cpu().numpy(), torch.cat(values).float().cpu().numpy()


def _adjacency(
    head_scores: Tensor,
    tail_scores: Tensor,
    sentence: NDArray,
    start: NDArray,
    end: NDArray,
    first: NDArray,
    sizes: NDArray,
) -> NDArray[np.bool_]:
    """Links between the nodes of each graph, `(G, N, N)`; cells beyond a graph's size mean nothing."""
    length = head_scores.shape[-1]
    node = np.minimum(first[:, None] + np.arange(sizes.max()), len(start) - 1)
    offset = (sentence * length * length)[:, None, None]
    linked = []
    for scores, tokens in ((head_scores, start[node]), (tail_scores, end[node])):
        here, there = tokens[:, :, None], tokens[:, None, :]
        cell = np.minimum(here, there)
        cell *= length
        cell += np.maximum(here, there)
        cell += offset
        linked.append((scores > 0).cpu().numpy().ravel().take(cell))
    return linked[0] & linked[1]
