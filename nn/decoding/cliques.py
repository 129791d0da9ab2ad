"""All maximal cliques of many small graphs at once.  Shapes: G graphs, N nodes of each, C cliques, W words.

Nodes are added one by one, and the cliques of all graphs are kept up to date in the same few array operations: with
node v, a clique K within its neighbourhood N(v) grows by v; any other stays, and K & N(v) with v is a new one if no
earlier node is linked to all of it. Cliques never get fewer on the way, so little work is lost, and no pivot is needed.
A set of nodes is a machine word. The first 11 nodes are added at once: S is a maximal clique exactly if the common
neighbourhood of its members, themselves included, is S, which a table of all their subsets answers.

Before that, twins (nodes linked to each other and to the same others) are merged: sets of events that share few
arguments become graphs of a few nodes, and a complete graph becomes a point.

Source: https://kexue.fm/archives/8926 (events are maximal cliques); S. Tsukiyama, M. Ide, H. Ariyoshi and I. Shirakawa
(1977), where nodes are added one by one.  Checked against: networkx.find_cliques.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

Words = NDArray[np.uint64]
MAX_NODES = 64
"""A graph must fit one machine word."""
ALL = ~np.uint64(0)
BIT = np.uint64(1) << np.arange(64, dtype=np.uint64)
BELOW = np.append(BIT - np.uint64(1), ALL)
"""BELOW[n] is the set of the first n nodes."""
AT_ONCE = 11
SUBSETS = np.arange(1 << AT_ONCE, dtype=np.uint16)
FEW, MANY = 4, 64
"""Up to so many graphs, and so many cliques of one, plain integers are faster than arrays."""


def maximal_cliques(adjacency: NDArray[np.bool_], cap: int | None = None) -> list[tuple[int, ...]]:
    """Maximal cliques of one graph.

    Args:
        adjacency: symmetric matrix of edges `(N, N)`, N at most 64; the diagonal is ignored.
        cap: give at most so many; all of them when None.

    Returns:
        Each clique as its nodes in ascending order.

    Raises:
        InputError: the matrix is not square or too large.
    """
    _, members, ends = batched_maximal_cliques(np.asarray(adjacency)[None], cap=cap)
    nodes, borders = members.tolist(), [0, *ends.tolist()]
    return [tuple(nodes[start:end]) for start, end in pairwise(borders)]


def batched_maximal_cliques(
    adjacency: NDArray[np.bool_], sizes: NDArray[np.integer] | None = None, cap: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Maximal cliques of a batch of graphs.

    Args:
        adjacency: symmetric matrices of edges `(G, N, N)`, N at most 64; diagonals are ignored.
        sizes: number of nodes of each graph `(G,)`, for graphs padded to a common N; all N when None.
        cap: give at most so many cliques of one graph. The search is cut as well, so time and memory stay bounded for
            any graph; what is given is maximal all the same.

    Returns:
        graphs: graph of every clique `(C,)`, ascending.
        members: nodes of all cliques, one clique after the other, ascending within each.
        ends: where each clique ends in `members`, `(C,)`.

    Raises:
        InputError: the matrices are not square or too large.
    """
    graph, clique = clique_words(adjacency, sizes, cap)
    return graph, members_of(clique), np.cumsum(np.bitwise_count(clique), dtype=np.int64)


def clique_words(
    adjacency: NDArray[np.bool_], sizes: NDArray[np.integer] | None = None, cap: int | None = None
) -> tuple[NDArray[np.int64], Words]:
    """`batched_maximal_cliques` with the nodes of each clique as the bits of a word, `(C,)`."""
    adjacency = np.asarray(adjacency, dtype=bool)
    if adjacency.ndim != 3 or adjacency.shape[1] != adjacency.shape[2] or adjacency.shape[1] > MAX_NODES:
        raise InputError(
            f"maximal cliques of an adjacency of shape {adjacency.shape}: use square matrices of at most "
            f"{MAX_NODES} nodes; keep the best-scoring nodes of a larger graph"
        )
    count, nodes, _ = adjacency.shape
    if not count * nodes:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    linked, sets = _pack(adjacency) | BIT[:nodes], None
    if sizes is not None and sizes.min() < nodes:
        # Nodes beyond a graph's size are linked to all others: they add no clique, and are cut off in the end.
        sets = BELOW[sizes]
        linked = np.where(np.arange(nodes) < sizes[:, None], linked | ~sets[:, None], ALL)
    near, wide = _merge_twins(linked) if count > FEW and nodes > AT_ONCE else (linked, None)

    # A graph's number and its nodes share a word: of graphs with many nodes, few are searched together.
    room = 1 if count <= FEW else min(256, 1 << (64 - _shift(near)))
    graphs, cliques = [], []
    for first in range(0, count, room):
        graph, clique = _search(near[first : first + room], cap)
        graphs.append(graph + first)
        cliques.append(clique if wide is None else _common(_tables(wide[first : first + room]), graph, clique))
    graph, clique = np.concatenate(graphs), np.concatenate(cliques)
    if sets is not None:
        clique &= sets[graph]
        if not sets.all():
            graph, clique = graph[clique != 0], clique[clique != 0]
    return graph, clique


def members_of(cliques: Words) -> NDArray[np.int64]:
    """Nodes of the cliques one after the other, ascending within each."""
    width = max(8, 1 << (int(cliques.max(initial=1)).bit_length() - 1).bit_length())
    bits = np.unpackbits(cliques.astype(f"<u{width // 8}").view(np.uint8), bitorder="little")
    members = np.flatnonzero(bits.view(np.bool_))
    members &= width - 1  # a power of two: the low bits of a place are its node
    return members


def _search(near: Words, cap: int | None) -> tuple[NDArray[np.int64], Words]:
    """Graph and nodes of every maximal clique, from the neighbours of each node, itself included, `(G, N)`."""
    nodes, shift = near.shape[1], np.uint64(_shift(near))
    # A clique in work: the graph's number above the nodes. Numbers are kept when neighbourhoods contain all of them.
    numbers = ~BELOW[shift]
    if len(near) == 1:
        keys, start = _one_by_one(near[0].tolist())
        tables = _tables(near) if start < nodes else near
    else:
        start = min(AT_ONCE, nodes)
        keys = _all_at_once(near[:, :start], shift)
        tables = _tables(near) if start < nodes else near
    columns = np.ascontiguousarray(near.T) | numbers
    for node in range(start, nodes):
        if cap is not None and len(keys) > cap:
            keys = _first_of_each(keys, shift, cap)
        graph = (keys >> shift).view(np.int64)
        within = keys & columns[node].take(graph)
        rest = (within != keys).nonzero()[0]
        new = within.take(rest) | BIT[node]
        kept = keys | BIT[node]
        kept[rest] = keys.take(rest)
        common = _common(tables[: node // 8 + 1], graph.take(rest), new)
        common ^= new
        new = new[common & BELOW[node + 1] == 0]
        new.sort()
        different = np.ones(len(new), np.bool_)
        np.not_equal(new[1:], new[:-1], out=different[1:])
        keys = np.concatenate([kept, new[different]])
    keys.sort(kind="stable")  # few runs, each in order
    if cap is not None and len(keys) > cap:
        keys = _first_of_each(keys, shift, cap)
    return (keys >> shift).view(np.int64), keys & ~numbers


def _all_at_once(near: Words, shift: np.uint64) -> Words:
    """Cliques of all graphs of few nodes, from the neighbours of each node `(G, N)`."""
    count, nodes = near.shape
    sets = near.T.astype(np.uint16, order="C")
    common = np.empty((1 << nodes, count), np.uint16)  # of each subset of the nodes
    common[0] = (1 << nodes) - 1
    for node in range(nodes):
        half = 1 << node
        np.bitwise_and(common[:half], sets[node], out=common[half : 2 * half])
    subset, graph = np.divmod(np.flatnonzero(common == SUBSETS[: 1 << nodes, None]), count)
    return (graph.view(np.uint64) << shift) | subset.view(np.uint64)


def _one_by_one(near: list[int]) -> tuple[Words, int]:
    """Cliques of the first nodes of one graph, up to where arrays are faster, and how many nodes these are."""
    cliques = [0]
    for node, around in enumerate(near):
        if len(cliques) > MANY:
            return np.array(cliques, np.uint64), node
        bit = 1 << node
        around &= bit - 1
        cuts = {clique & around for clique in cliques if clique & around != clique}
        cliques = [clique if clique & around != clique else clique | bit for clique in cliques]
        for cut in cuts:
            common, left = around, cut
            while left and common != cut:
                common &= near[left.bit_length() - 1]
                left &= (1 << left.bit_length() - 1) - 1
            if common == cut:
                cliques.append(cut | bit)
    return np.array(cliques, np.uint64), len(near)


def _merge_twins(linked: Words) -> tuple[Words, Words | None]:
    """Neighbours of one of each kind of twins `(G, K)`: among these ones, and among all (None when nobody has any)."""
    nodes = linked.shape[1]
    same = ((linked[:, :, None] == linked[:, None, :]) & np.tri(nodes, k=-1, dtype=np.bool_)).any(2)
    count = nodes - int(same.sum(1).min())
    if count == nodes:
        return linked, None
    # Where a graph has fewer than others, some of its twins are among the chosen, which does no harm.
    chosen = np.argsort(same, axis=1, kind="stable")[:, :count]
    wide = np.take_along_axis(linked, chosen, 1)
    return _pack((wide[:, :, None] & BIT[chosen][:, None, :]) != 0), wide


def _shift(near: Words) -> int:
    """Where a graph's number begins, in a word that also holds a set of its nodes: at the next octet."""
    return -(-near.shape[1] // 8) * 8


def _tables(sets: Words) -> Words:
    """Intersections of all choices among the sets `(G, N)`, eight at a time, `(N / 8, G, 256)`; of none: ALL."""
    count, nodes = sets.shape
    tables = np.empty((-(-nodes // 8), count, 256), np.uint64)
    tables[:, :, 0] = ALL
    for node in range(nodes):
        table, half = tables[node // 8], 1 << node % 8
        np.bitwise_and(table[:, :half], sets[:, node, None], out=table[:, half : 2 * half])
    return tables


def _common(tables: Words, graph: NDArray[np.int64], clique: Words) -> Words:
    """Intersection of the sets that the bits of `clique` choose, given the sets' `_tables`."""
    row, octets = graph << 8, _octets(clique)
    common = tables[0].ravel().take(row + octets[:, 0])
    for number, table in enumerate(tables[1:], start=1):
        common &= table.ravel().take(row + octets[:, number])
    return common


def _first_of_each(keys: Words, shift: np.uint64, count: int) -> Words:
    """The first `count` keys of each graph, in the order of the graphs."""
    graph = (keys >> shift).view(np.int64)
    if np.bincount(graph).max() <= count:
        return keys
    order = np.argsort(graph, kind="stable")
    graph = graph[order]
    return keys[order[np.arange(len(order)) - np.searchsorted(graph, graph) < count]]


def _pack(rows: NDArray[np.bool_]) -> Words:
    """Booleans `(..., N)` as words `(...)`, the first one lowest."""
    wide = np.zeros((*rows.shape[:-1], 64), np.bool_)
    wide[..., : rows.shape[-1]] = rows
    return np.packbits(wide, bitorder="little").view("<u8").astype(np.uint64, copy=False).reshape(rows.shape[:-1])


def _octets(words: Words) -> NDArray[np.uint8]:
    """Words `(W,)` as bytes `(W, 8)`, lowest first."""
    return np.ascontiguousarray(words).astype("<u8", copy=False).view(np.uint8).reshape(-1, 8)
