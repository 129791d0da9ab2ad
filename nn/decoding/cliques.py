"""All maximal cliques of many small graphs at once.  Shapes: G graphs, N nodes of each, C cliques, F open branches.

Bron and Kerbosch's enumeration with Tomita's pivot, where a set of nodes is one machine word and all open branches of
all graphs are expanded in the same few array operations: no recursion, and the batch shares the cost of Python.

Source: https://kexue.fm/archives/8926 (events are maximal cliques); C. Bron and J. Kerbosch, Algorithm 457 (1973);
E. Tomita, A. Tanaka and H. Takahashi (2006).  Checked against: networkx.find_cliques.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

MAX_NODES = 64
"""A graph must fit one machine word."""


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
    adjacency = np.asarray(adjacency, dtype=bool)
    if adjacency.ndim != 2:
        raise InputError(f"maximal_cliques(adjacency of shape {adjacency.shape}): use a square matrix")
    _, members, ends = batched_maximal_cliques(adjacency[None], cap=cap)
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
    adjacency = np.asarray(adjacency, dtype=bool)
    if adjacency.ndim != 3 or adjacency.shape[1] != adjacency.shape[2] or adjacency.shape[1] > MAX_NODES:
        raise InputError(
            f"maximal cliques of an adjacency of shape {adjacency.shape}: use square matrices of at most "
            f"{MAX_NODES} nodes; keep the best-scoring nodes of a larger graph"
        )
    sizes = np.full(len(adjacency), adjacency.shape[1]) if sizes is None else np.asarray(sizes)
    graphs, cliques = _search(_words(adjacency), sizes, cap)
    order = np.argsort(graphs, kind="stable")
    graphs, cliques = graphs[order], cliques[order]
    if cap is not None:
        kept = _first_of_each(graphs, cap)
        graphs, cliques = graphs[kept], cliques[kept]
    members = np.flatnonzero(_bits(cliques)) & (8 * cliques.itemsize - 1)
    return graphs, members, np.cumsum(np.bitwise_count(cliques), dtype=np.int64)


def _search(
    neighbours: NDArray[np.unsignedinteger], sizes: NDArray[np.integer], cap: int | None
) -> tuple[NDArray[np.int64], NDArray[np.unsignedinteger]]:
    """Graph and nodes of every maximal clique, given the neighbours of each node as words `(G, W)` of W bits."""
    word = neighbours.dtype.type
    width = neighbours.shape[1]
    flat, strangers = neighbours.ravel(), ~neighbours  # a node is no neighbour of itself, so it is among its strangers
    one = word(1)
    bit = one << np.arange(width, dtype=word)
    found: list[tuple[NDArray[np.int64], NDArray[np.unsignedinteger]]] = []

    def neighbours_of(graph: NDArray, single: NDArray) -> NDArray:
        return flat[graph * width + np.bitwise_count(single - one)]

    def close(graph: NDArray, clique: NDArray, excluded: NDArray) -> None:
        """A branch without candidates is a maximal clique unless some excluded node could join it."""
        maximal = excluded == 0
        found.append((graph[maximal], clique[maximal]))

    # A branch: its graph, the clique so far, the nodes that may join it, and those whose cliques are already known.
    graph = np.flatnonzero(sizes > 0)
    candidates = ~word(0) >> (width - sizes[graph]).astype(word)
    clique, excluded = np.zeros_like(candidates), np.zeros_like(candidates)
    while len(graph):
        # Pivot: the node that leaves the fewest candidates to branch on, itself included (a node of neither set: 255).
        remaining = np.take(strangers, graph, axis=0) & candidates[:, None]
        counts = np.bitwise_count(remaining) | (_bits(candidates | excluded).view(np.uint8) - np.uint8(1))
        branching = remaining[np.arange(len(graph)), counts.argmin(1)]
        # One child for each branching node; earlier siblings are excluded from later ones.
        place = np.flatnonzero(_bits(branching))
        parent, node = place // width, place & (width - 1)
        joined = bit[node]
        earlier = branching[parent] & (joined - one)
        graph = graph[parent]
        near = flat[graph * width + node]
        clique = clique[parent] | joined
        excluded = (excluded[parent] | earlier) & near
        candidates = (candidates[parent] ^ earlier) & near
        # Children with up to two candidates end here: they are most of the tree, and need no pivot.
        count = np.bitwise_count(candidates)
        none, single, pair, more = (np.flatnonzero(count == 0), np.flatnonzero(count == 1),
                                    np.flatnonzero(count == 2), np.flatnonzero(count > 2))  # fmt: skip
        close(graph[none], clique[none], excluded[none])
        last = candidates[single]
        close(graph[single], clique[single] | last, excluded[single] & neighbours_of(graph[single], last))
        if len(pair):
            where, base, out = graph[pair], clique[pair], excluded[pair]
            low = candidates[pair] & (~candidates[pair] + one)
            high = candidates[pair] ^ low
            near_low, near_high = neighbours_of(where, low), neighbours_of(where, high)
            linked = (near_low & high) != 0
            both, apart = np.flatnonzero(linked), np.flatnonzero(~linked)
            close(where[both], (base | low | high)[both], (out & near_low & near_high)[both])
            close(where[apart], (base | low)[apart], (out & near_low)[apart])
            close(where[apart], (base | high)[apart], (out & near_high)[apart])
        if cap is not None and len(more) > cap:
            more = more[_first_of_each(graph[more], cap)]
        graph, clique, candidates, excluded = graph[more], clique[more], candidates[more], excluded[more]
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, word)
    return np.concatenate([graphs for graphs, _ in found]), np.concatenate([cliques for _, cliques in found])


def _words(adjacency: NDArray[np.bool_]) -> NDArray[np.unsignedinteger]:
    """Rows of edges as words: `(G, N, N)` bool to `(G, W)` of W = 32 or 64 bits, rows and bits beyond N empty."""
    graphs, nodes, _ = adjacency.shape
    width = 32 if nodes <= 32 else 64
    padded = np.zeros((graphs, width, width), dtype=bool)
    padded[:, :nodes, :nodes] = adjacency
    diagonal = np.arange(width)
    padded[:, diagonal, diagonal] = False
    words = np.packbits(padded, axis=-1, bitorder="little").view(f"<u{width // 8}")[..., 0]
    return words.astype(words.dtype.newbyteorder("="))


def _bits(words: NDArray[np.unsignedinteger]) -> NDArray[np.bool_]:
    """Words `(F,)` of W bits as booleans `(F, W)`, lowest bit first."""
    little = np.ascontiguousarray(words).astype(words.dtype.newbyteorder("<"), copy=False)
    octets = little.view(np.uint8).reshape(len(words), words.itemsize)
    return np.unpackbits(octets, axis=1, bitorder="little").view(np.bool_)


def _first_of_each(groups: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Positions of the first `count` members of each group, for groups in ascending order."""
    return np.flatnonzero(np.arange(len(groups)) - np.searchsorted(groups, groups) < count)
