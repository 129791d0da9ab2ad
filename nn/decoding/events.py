"""From span and link scores to events.  Shapes: B batch, H labels, T tokens, G graphs of N nodes.

A node is a positive cell of the argument scores: (event type, role, start, end), so one span in two roles is two nodes.
Two nodes of one type are linked when their first tokens and their last tokens are both linked; the events of a type are
the maximal cliques of its graph. Since nodes are distinct, no event's arguments are a subset of another's.

Source: https://kexue.fm/archives/8926.
"""

from collections.abc import Sequence
from itertools import chain, islice, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ..heads.scores import CompactScores
from .cliques import BIT, MAX_NODES, Words, clique_words, members_of
from .spans import best_positive_cells, positive

Span = tuple[str, int, int]
"""(role, first token, last token), the last one inclusive."""
Events = dict[str, list[tuple[Span, ...]]]
"""The events of each type that is there, an event being its arguments in the order of the text."""
EVENTS_AT_ONCE = 1 << 12
"""Events spelt out together: what they are made of stays in the processor's cache."""


def decode_events(
    argument_scores: Tensor,
    head_scores: Tensor,
    tail_scores: Tensor,
    labels: Sequence[Sequence[str]],
    max_nodes: int = 30,
    required_role: str | None = None,
) -> Events:
    """Events of one sentence: `decode_event_batch` for scores `(H, T, T)`, `(T, T)` and `(T, T)`."""
    scores = argument_scores[None], head_scores[None], tail_scores[None]
    return decode_event_batch(*scores, labels, max_nodes=max_nodes, required_role=required_role)[0]


@torch.no_grad()
def decode_event_batch(
    argument_scores: Tensor | CompactScores,
    head_scores: Tensor,
    tail_scores: Tensor,
    labels: Sequence[Sequence[str]],
    places: Tensor | None = None,
    *,
    max_nodes: int = 30,
    max_events: int = 1000,
    required_role: str | None = None,
) -> list[Events]:
    """Events of every sentence of a batch; a cell counts when its score is above 0.

    Args:
        argument_scores: `(B, H, T, T)`, in full or compact.
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
    graph, start, end, label = best_positive_cells(argument_scores, places, type_of, max_nodes, "max_nodes")
    batch = len(argument_scores)
    if not len(graph):
        return [{} for _ in range(batch)]

    sizes = np.bincount(graph)
    present = np.flatnonzero(sizes)
    sizes = sizes[present]
    first = np.cumsum(sizes) - sizes  # the nodes of a graph are neighbours in the list
    sentence, kind = np.divmod(present, len(kinds))
    adjacency = _adjacency([(head_scores, start), (tail_scores, end)], sentence, first, sizes)
    owner, cliques = clique_words(adjacency, sizes, cap=max_events)
    roles = np.array([role for _, role in labels], dtype=object)
    if required_role is not None:
        wanted = (roles == required_role)[label]
        bit = BIT[np.arange(len(label)) - np.repeat(first, sizes)] * wanted
        kept = (cliques & np.bitwise_or.reduceat(bit, first)[owner]) != 0
        owner, cliques = owner[kept], cliques[kept]

    spans = zip(roles.take(label).tolist(), start.tolist(), end.tolist(), strict=True)
    arguments = np.fromiter(spans, dtype=object, count=len(label))
    events = _spell_out(cliques, first[owner], arguments)
    borders = np.searchsorted(owner, np.arange(len(present) + 1)).tolist()
    names = list(kinds)
    decoded: list[Events] = [{} for _ in range(batch)]
    for row, number, (begin, stop) in zip(sentence.tolist(), kind.tolist(), pairwise(borders), strict=True):
        if begin < stop:
            decoded[row][names[number]] = events[begin:stop]
    return decoded


@torch.no_grad()
def _spell_out(cliques: Words, first: NDArray, arguments: NDArray[np.object_]) -> list[tuple[Span, ...]]:
    """The arguments of each clique; `first` is where those of its graph begin."""
    events: list[tuple[Span, ...]] = []
    for begin in range(0, len(cliques), EVENTS_AT_ONCE):
        part = slice(begin, begin + EVENTS_AT_ONCE)
        sizes = np.bitwise_count(cliques[part])
        order = sizes.argsort(kind="stable")
        members = members_of(cliques[part][order])
        members += np.repeat(first[part][order], sizes[order])
        chosen = iter(arguments.take(members).tolist())
        # Cliques of one size are cut from the list in a single step, afterwards all go back to where they were.
        groups = (islice(zip(*[chosen] * size, strict=True), count) for size, count in enumerate(np.bincount(sizes)))
        by_size = np.fromiter(chain.from_iterable(groups), dtype=object, count=len(order))
        in_order = np.empty_like(by_size)
        in_order[order] = by_size
        events += in_order.tolist()
    return events


def _adjacency(
    links: Sequence[tuple[Tensor, NDArray]], sentence: NDArray, first: NDArray, sizes: NDArray
) -> NDArray[np.bool_]:
    """Links between the nodes of each graph, `(G, N, N)`; cells beyond a graph's size mean nothing."""
    # Graphs come last here, for NumPy is fast along long rows.
    node = np.minimum(np.arange(sizes.max())[:, None] + first, sizes.sum() - 1)
    linked = np.ones((), np.bool_)
    for scores, tokens in links:
        token, length = tokens[node], scores.shape[-1]
        cell = ((sentence * length + token) * length)[:, None] + token
        cell = np.minimum(cell, cell.swapaxes(0, 1))  # of (i, j) and (j, i), the one above the diagonal
        linked = linked & positive(scores).ravel().take(cell)
    return linked.transpose(2, 0, 1)
