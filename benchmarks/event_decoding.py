"""Event decoding: sentences/s of kexue, of the rule's plain recursion, and of networkx, from the same score matrices.

Each sentence holds one event type whose arguments form a random graph. All three read the nodes from the same matrices
with one array operation, and all give the same events, which is checked before anything is timed; the last column is
the search for cliques alone. kexue decodes a batch at once; the rows of batch 1 show what is left without that. The
recursion explodes on dense graphs: it gets `--limit` seconds a row, and where that is not enough for one sentence, its
speed is an upper bound and the ratio to it a lower one.

    python benchmarks/event_decoding.py [--json FILE] [--repeats 5] [--limit 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

import networkx as nx
import numpy as np
import torch
from common import in_turn, median_and_spread, report
from torch import Tensor

from kexue.nn.decoding import batched_maximal_cliques, decode_event_batch

LABELS = [["event", f"role {number}"] for number in range(4)]
Node = tuple[str, int, int]
Event = Sequence[Node]
Scores = tuple[Tensor, Tensor, Tensor]


class OutOfTime(Exception):
    """The recursion has used up its time."""


def sentences(nodes: int, density: float, count: int) -> tuple[Scores, list[nx.Graph]]:
    """Score matrices of sentences whose arguments form random graphs, and the graphs."""
    graphs = [nx.gnp_random_graph(nodes, density, seed=seed) for seed in range(count)]
    place = np.arange(nodes)
    edges = np.stack([nx.to_numpy_array(graph, dtype=bool) for graph in graphs])
    arguments = -torch.ones(count, len(LABELS), nodes, nodes)
    arguments[:, place % len(LABELS), place, place] = 1
    links = torch.from_numpy(np.where(np.triu(edges), 1.0, -1.0).astype(np.float32))
    return (arguments, links, links.clone()), graphs


def nodes_and_links(scores: Scores) -> Iterator[tuple[list[Node], list[tuple[int, int]]]]:
    """What both peers start from: the nodes of each sentence and its linked pairs."""
    for arguments, heads, tails in zip(*((part.numpy() > 0) for part in scores), strict=True):
        found = sorted(zip(*(part.tolist() for part in arguments.nonzero()), strict=True), key=lambda cell: cell[1:])
        nodes = [(LABELS[label][1], start, end) for label, start, end in found]
        head, tail = heads.tolist(), tails.tolist()
        yield (
            nodes,
            [
                (one, other)
                for (one, (_, i, j)), (other, (_, k, m)) in combinations(enumerate(nodes), 2)
                if head[min(i, k)][max(i, k)] and tail[min(j, m)][max(j, m)]
            ],
        )


def recursive_cliques(chosen: frozenset[int], near: list[set[int]], deadline: float) -> set[frozenset[int]]:
    """The rule as the article has it: split at every pair that is not linked, into the neighbourhoods of both."""
    if time.perf_counter() > deadline:
        raise OutOfTime
    parts = set()
    for one, other in combinations(chosen, 2):
        if other not in near[one]:
            parts |= {chosen & (near[one] | {one}), chosen & (near[other] | {other})}
    if not parts:
        return {chosen}
    return set().union(*(recursive_cliques(part, near, deadline) for part in parts))


def neighbours(count: int, links: list[tuple[int, int]]) -> list[set[int]]:
    near: list[set[int]] = [set() for _ in range(count)]
    for one, other in links:
        near[one].add(other)
        near[other].add(one)
    return near


def by_networkx(scores: Scores) -> list[list[Event]]:
    decoded: list[list[Event]] = []
    for nodes, links in nodes_and_links(scores):
        graph = nx.Graph()
        graph.add_nodes_from(range(len(nodes)))
        graph.add_edges_from(links)
        decoded.append([[nodes[node] for node in clique] for clique in nx.find_cliques(graph)])
    return decoded


def by_recursion(scores: Scores, limit: float) -> tuple[list[list[Event]], float]:
    """Events of as many sentences as the time allows, and the sentences/s (an upper bound when there are none)."""
    begin = time.perf_counter()
    decoded: list[list[Event]] = []
    try:
        for nodes, links in nodes_and_links(scores):
            cliques = recursive_cliques(frozenset(range(len(nodes))), neighbours(len(nodes), links), begin + limit)
            decoded.append([[nodes[node] for node in clique] for clique in cliques])
    except OutOfTime:
        pass
    return decoded, max(len(decoded), 1) / (time.perf_counter() - begin)


def by_kexue(scores: Scores, batch: int) -> list[list[Event]]:
    decoded: list[list[Event]] = []
    for first in range(0, len(scores[0]), batch):
        arguments, heads, tails = (part[first : first + batch] for part in scores)
        found = decode_event_batch(arguments, heads, tails, LABELS, max_nodes=30, max_events=100_000)
        decoded += [[spans for _, spans in events] for events in found]
    return decoded


def in_any_order(events: list[Event]) -> list[list[Node]]:
    return sorted(sorted(event) for event in events)


def timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(nodes: int, density: float, batch: int, count: int, repeats: int, limit: float) -> dict[str, Any]:
    """One row of the table."""
    scores, graphs = sentences(nodes, density, count)
    edges = np.stack([nx.to_numpy_array(graph, dtype=bool) for graph in graphs])
    expected = [in_any_order(events) for events in by_networkx(scores)]
    assert [in_any_order(events) for events in by_kexue(scores, batch)] == expected
    recursive, speed = by_recursion(scores, limit)
    assert [in_any_order(events) for events in recursive] == expected[: len(recursive)]

    def our_cliques() -> None:
        for first in range(0, count, batch):
            _, members, ends = batched_maximal_cliques(edges[first : first + batch])
            listed = members.tolist()
            [listed[begin:end] for begin, end in pairwise([0, *ends.tolist()])]

    runs = {
        "kexue": lambda: timed(lambda: by_kexue(scores, batch)),
        "networkx": lambda: timed(lambda: by_networkx(scores)),
        "our cliques": lambda: timed(our_cliques),
        "their cliques": lambda: timed(lambda: [list(nx.find_cliques(graph)) for graph in graphs]),
    }
    times = in_turn(runs, repeats)
    ours, spread = median_and_spread([count / seconds for seconds in times["kexue"]])
    theirs, _ = median_and_spread([count / seconds for seconds in times["networkx"]])
    cliques, _ = median_and_spread(
        [them / us for us, them in zip(times["our cliques"], times["their cliques"], strict=True)]
    )
    bound = "" if recursive else ">"
    return {
        "nodes": nodes,
        "density": density,
        "batch": batch,
        "events a sentence": round(sum(map(len, expected)) / count, 1),
        "kexue, sentences/s": round(ours),
        "spread": round(spread),
        "networkx, sentences/s": round(theirs),
        "ratio": f"{ours / theirs:.1f}",
        "recursion, sentences/s": f"{'<' if bound else ''}{speed:.3g}",
        "sentences it did": f"{len(recursive)} of {count}",
        "ratio to it": f"{bound}{ours / speed:.3g}",
        "cliques only, ratio to networkx": f"{cliques:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=5.0, help="seconds for the recursion on a row")
    parser.add_argument("--sentences", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(nodes, density) for nodes in (10, 20, 30) for density in (0.5, 0.7, 0.9)]
    rows = [
        measure(nodes, density, batch, options.sentences, options.repeats, options.limit)
        for batch in (options.sentences, 1)
        for nodes, density in sizes
    ]
    report("event decoding", rows, options.json)


if __name__ == "__main__":
    main()
