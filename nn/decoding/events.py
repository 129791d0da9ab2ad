"""From span and link scores to events.  Shapes: B batch, H labels, T tokens, G graphs of N nodes.

A node is a positive cell of the argument scores: (event type, role, start, end), so one span in two roles is two nodes.
Two nodes of one type are linked when their first tokens and their last tokens are both linked; the events of a type are
the maximal cliques of its graph. Since nodes are distinct, no event's arguments are a subset of another's.

Source: https://kexue.fm/archives/8926.
"""

import warnings
from collections.abc import Sequence

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
    sentence, label, start, end = _nodes(argument_scores, places, type_of, max_nodes)
    events: list[list[DecodedEvent]] = [[] for _ in range(len(argument_scores))]
    if not len(sentence):
        return events

    # The nodes of a graph are neighbours in the list: (sentence, type) changes where the next graph begins.
    _, first, sizes = np.unique(sentence * len(types) + type_of[label], return_index=True, return_counts=True)
    adjacency = _adjacency(head_scores, tail_scores, sentence[first], start, end, first, sizes)
    graphs, members, ends = batched_maximal_cliques(adjacency, sizes, cap=max_events)

    cells = zip(label.tolist(), start.tolist(), end.tolist(), strict=True)
    spans = np.fromiter(((labels[i][1], j, k) for i, j, k in cells), dtype=object, count=len(label))
    members = members + np.repeat(first[graphs], np.diff(ends, prepend=0))
    # Tuples of plain values, slices of one: thousands of lists would keep Python's garbage collector busy.
    chosen = tuple(spans[members].tolist())
    rows, kinds, begin = sentence[first[graphs]].tolist(), type_of[label[first[graphs]]].tolist(), 0
    for row, kind, stop in zip(rows, kinds, ends.tolist(), strict=True):
        event = chosen[begin:stop]
        begin = stop
        if required_role is None or any(span[0] == required_role for span in event):
            events[row].append((types[kind], event))
    return events


def _nodes(
    scores: Tensor | FactoredScores, places: Tensor | None, type_of: NDArray, max_nodes: int
) -> tuple[NDArray, ...]:
    """(sentence, label, start, end) of the arguments, ordered by (sentence, type, start, end, label)."""
    _, num_labels, length, _ = scores.shape
    limit = max_nodes * (int(type_of.max()) + 1)  # more cannot survive, so what is read off a device stays small
    spans = torch.ones(len(scores), length, length, dtype=torch.bool, device=scores[0].device).triu()
    if places is not None:
        spans &= places[:, :, None] & places[:, None, :]
    columns: list[Tensor] = []
    values: list[Tensor] = []
    for row, matrices in enumerate(scores):
        flat = matrices.flatten()
        cells = ((matrices > 0) & spans[row]).flatten().nonzero()[:, 0]
        value = flat[cells]
        if len(cells) > limit:
            value, best = value.topk(limit)
            cells = cells[best]
        columns.append(cells + row * num_labels * length * length)
        values.append(value)
    cells, score = torch.cat(columns).cpu().numpy(), torch.cat(values).detach().float().cpu().numpy()
    sentence, label, start, end = np.unravel_index(cells, tuple(scores.shape))
    graph = sentence * (type_of.max() + 1) + type_of[label]

    best_first = np.lexsort((-score, graph))
    rank = np.arange(len(graph)) - np.searchsorted(graph[best_first], graph[best_first])
    if (rank >= max_nodes).any():
        warnings.warn(
            "more candidate arguments of one event type in a sentence than max_nodes: the best-scoring ones are kept "
            "(usual in the first epochs)",
            stacklevel=3,
        )
    kept = best_first[rank < max_nodes]
    kept = kept[np.lexsort((label[kept], end[kept], start[kept], graph[kept]))]
    return sentence[kept], label[kept], start[kept], end[kept]


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
    node = np.minimum(first[:, None] + np.arange(sizes.max()), len(start) - 1)
    linked = True
    for scores, tokens in ((head_scores, start[node]), (tail_scores, end[node])):
        here, there = tokens[:, :, None], tokens[:, None, :]
        cells = (scores > 0).cpu().numpy()
        linked = linked & cells[sentence[:, None, None], np.minimum(here, there), np.maximum(here, there)]
    return linked
