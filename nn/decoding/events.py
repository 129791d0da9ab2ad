"""From span and link scores to events.  Shapes: B batch, H labels, T tokens, G graphs of N nodes.

A node is a positive cell of the argument scores: (event type, role, start, end), so one span in two roles is two nodes.
Two nodes of one type are linked when their first tokens and their last tokens are both linked; the events of a type are
the maximal cliques of its graph. Since nodes are distinct, no event's arguments are a subset of another's.

Source: https://kexue.fm/archives/8926.
"""

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ..heads.scores import FactoredScores
from .cliques import BIT, MAX_NODES, clique_words, members_of

Span = tuple[str, int, int]
"""(role, first token, last token), the last one inclusive."""
DecodedEvent = tuple[str, tuple[Span, ...]]
"""(event type, arguments in the order of the text)."""
CELLS_AT_ONCE = 1 << 22
"""Scores written out and searched together."""
EVENTS_AT_ONCE = 1 << 11
"""Events built together: what they are built from stays in the processor's cache."""


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


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Events are tuples of strings and numbers, many thousands and no cycle: to look for cycles is a waste of time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@torch.no_grad()
@_no_garbage_collection()
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
    kinds = {event_type: number for number, event_type in enumerate(dict.fromkeys(kind for kind, _ in labels))}
    type_of = np.array([kinds[event_type] for event_type, _ in labels])
    graph, start, end, label = _nodes(argument_scores, places, type_of, max_nodes)
    batch = len(argument_scores)
    if not len(graph):
        return [[] for _ in range(batch)]

    sizes = np.bincount(graph)
    present = np.flatnonzero(sizes)
    sizes = sizes[present]
    first = np.cumsum(sizes) - sizes  # the nodes of a graph are neighbours in the list
    sentence, kind = np.divmod(present, len(kinds))
    adjacency = _adjacency([(head_scores, start), (tail_scores, end)], sentence, first, sizes)
    owner, cliques = clique_words(adjacency, sizes, cap=max_events)
    roles = [role for _, role in labels]
    if required_role is not None:
        wanted = np.array([role == required_role for role in roles])[label]
        bit = BIT[np.arange(len(label)) - np.repeat(first, sizes)] * wanted
        kept = (cliques & np.bitwise_or.reduceat(bit, first)[owner]) != 0
        owner, cliques = owner[kept], cliques[kept]

    spans = zip(map(roles.__getitem__, label.tolist()), start.tolist(), end.tolist(), strict=True)
    arguments = np.fromiter(spans, dtype=object, count=len(label))
    names, base = list(kinds), first[owner]
    type_names = list(map(names.__getitem__, kind[owner].tolist()))
    events: list[DecodedEvent] = []
    for part in (slice(begin, begin + EVENTS_AT_ONCE) for begin in range(0, len(cliques), EVENTS_AT_ONCE)):
        members, ends = members_of(cliques[part])
        stops = ends.tolist()
        members += np.repeat(base[part], np.diff(ends, prepend=0))
        chosen = tuple(arguments.take(members).tolist())
        events += zip(type_names[part], [chosen[begin:stop] for begin, stop in pairwise([0, *stops])], strict=True)
    borders = np.searchsorted(sentence[owner], np.arange(batch + 1)).tolist()
    return [events[begin:stop] for begin, stop in pairwise(borders)]


def _nodes(
    scores: Tensor | FactoredScores, places: Tensor | None, type_of: NDArray, max_nodes: int
) -> tuple[NDArray, ...]:
    """(graph, start, end, label) of the arguments, so ordered; a graph is sentence * types + type."""
    batch, num_labels, length, _ = scores.shape
    num_types = int(type_of.max()) + 1
    graph_of = (np.arange(batch)[:, None] * num_types + type_of).ravel()
    together = max(1, CELLS_AT_ONCE // (num_labels * length * length))
    found, crowded = [], False
    for first in range(0, batch, together):
        rows = slice(first, first + together)
        if isinstance(scores, FactoredScores):
            block = FactoredScores(scores.shared[rows], scores.start[rows], scores.end[rows]).dense()
        else:
            block = scores[rows]
        block = block.flatten(0, 1)
        matrix, start, end = _positive_cells(block, length)
        seen = start <= end
        if places is not None:
            allowed, sentence = places[rows].cpu().numpy(), matrix // num_labels
            seen &= allowed[sentence, start] & allowed[sentence, end]
        if not seen.all():
            matrix, start, end = matrix[seen], start[seen], end[seen]
        graph = graph_of[first * num_labels :].take(matrix)
        if len(graph) > max_nodes and np.bincount(graph).max() > max_nodes:
            best = _best_cells(block, (matrix, start, end), graph, max_nodes)
            matrix, start, end, graph = matrix[best], start[best], end[best], graph[best]
            crowded = True
        # One number for each, in the order wanted.
        found.append(((graph * length + start) * length + end) * num_labels + matrix % num_labels)
    if crowded:
        warnings.warn(
            "more candidate arguments of one event type in a sentence than max_nodes: the best-scoring ones are kept "
            "(usual in the first epochs)",
            stacklevel=5,
        )
    order, label = np.divmod(np.sort(np.concatenate(found)), num_labels)
    order, end = np.divmod(order, length)
    graph, start = np.divmod(order, length)
    return graph, start, end, label


def _positive_cells(matrices: Tensor, length: int) -> tuple[NDArray[np.int64], ...]:
    """(matrix, row, column) of the scores above 0."""
    positive = (matrices > 0).flatten()
    if positive.device.type == "cpu":
        cells = np.flatnonzero(positive.numpy())  # several times as fast as PyTorch's
    else:
        cells = positive.nonzero()[:, 0].cpu().numpy()
    rows, column = np.divmod(cells, length)
    return *np.divmod(rows, length), column


def _best_cells(
    matrices: Tensor, cells: tuple[NDArray[np.int64], ...], graph: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """Which cells are the `count` best of their graph."""
    cell = tuple(torch.from_numpy(part).to(matrices.device) for part in cells)
    values = matrices[cell].float()
    # Sorting all would take long; the best of a graph are among the best of its matrices.
    seen = values.new_full(matrices.shape, -torch.inf)
    seen[cell] = values
    lowest = seen.flatten(1).topk(min(count, seen[0].numel()))[0][:, -1]
    chosen = np.flatnonzero((values >= lowest[cell[0]]).cpu().numpy())
    graph, score = graph[chosen], values.cpu().numpy()[chosen]
    best_first = np.lexsort((-score, graph))
    graph = graph[best_first]
    return chosen[best_first[np.arange(len(graph)) - np.searchsorted(graph, graph) < count]]


def _adjacency(
    links: Sequence[tuple[Tensor, NDArray]], sentence: NDArray, first: NDArray, sizes: NDArray
) -> NDArray[np.bool_]:
    """Links between the nodes of each graph, `(G, N, N)`; cells beyond a graph's size mean nothing."""
    node = np.minimum(first[:, None] + np.arange(sizes.max()), sizes.sum() - 1)
    linked = []
    for scores, tokens in links:
        here, there = tokens[node][:, :, None], tokens[node][:, None, :]
        cell = np.minimum(here, there)
        length = scores.shape[-1]
        cell *= length
        cell += np.maximum(here, there)
        cell += (sentence * length * length)[:, None, None]
        linked.append((scores > 0).cpu().numpy().ravel().take(cell))
    return linked[0] & linked[1]
