"""Event decoding: sentences/s of kexue, of the rule's plain recursion, and of networkx, from the same score matrices.

Each sentence holds one event type. Its arguments form a random graph of the given density, or, in the rows named
"shared", what events make: 2 to 5 cliques that cover the nodes and share some of them. All three give the same result,
the arguments of each event in the order of the text; this is checked on 64 sentences of a row before anything is timed.
The peers read nodes and links of a sentence with a few array operations.

Three comparisons with networkx: from scores to events; cliques alone from graphs that are ready, both as Python lists;
and the same with our cliques as the arrays that the search returns. "1000 by 64" decodes 1000 sentences in batches,
once. `timeit` repeats what is short and stops the garbage collector, whose full runs would hit whoever is at work; the
results to be collected are the same on both sides. The recursion explodes on dense graphs: it gets `--limit` seconds a
row, and where that is not enough for one sentence, its speed is an upper bound and the ratio to it a lower one.

    python benchmarks/event_decoding.py [--json FILE] [--repeats 3] [--limit 1] [--nodes 10 20 30] [--sentences 1000]
"""

from __future__ import annotations

import argparse
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, pairwise
from typing import Any

import networkx as nx
import numpy as np
import torch
from common import in_turn, median_and_spread, report
from torch import Tensor

from kexue.nn.decoding import batched_maximal_cliques, decode_event_batch
from kexue.nn.decoding.events import Events, Span

CHECKED = 64
"""So many sentences of a row are decoded in all three ways and compared."""
TYPE = "event"
LABELS = [[TYPE, f"role {number}"] for number in range(4)]
Scores = tuple[Tensor, Tensor, Tensor]


class OutOfTime(Exception):
    """The recursion has used up its time."""


def shared_cliques(nodes: int, seed: int) -> nx.Graph:
    """The graph of 2 to 5 events: each node is an argument of one, and one in five of a second one too."""
    random = np.random.default_rng(seed)
    events = 2 + seed % 4
    member = np.zeros((nodes, events), dtype=bool)
    member[np.arange(nodes), random.integers(events, size=nodes)] = True
    both = random.random(nodes) < 0.2
    member[both, random.integers(events, size=both.sum())] = True
    linked = member @ member.T
    return nx.from_edgelist(zip(*np.triu(linked).nonzero(), strict=True))


def sentences(nodes: int, kind: float | str, count: int) -> tuple[Scores, list[nx.Graph]]:
    """Score matrices of sentences whose arguments form graphs of one kind, and the graphs."""
    if isinstance(kind, str):
        graphs = [shared_cliques(nodes, seed) for seed in range(count)]
    else:
        graphs = [nx.gnp_random_graph(nodes, kind, seed=seed) for seed in range(count)]
    for graph in graphs:
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    place = np.arange(nodes)
    edges = matrices(graphs)
    arguments = -torch.ones(count, len(LABELS), nodes, nodes)
    arguments[:, place % len(LABELS), place, place] = 1
    links = torch.from_numpy(np.where(np.triu(edges), 1.0, -1.0).astype(np.float32))
    return (arguments, links, links.clone()), graphs


def matrices(graphs: list[nx.Graph]) -> np.ndarray:
    return np.stack([nx.to_numpy_array(graph, nodelist=range(len(graph)), dtype=bool) for graph in graphs])


def nodes_and_links(scores: Scores) -> Iterator[tuple[list[Span], list[tuple[int, int]]]]:
    """What both peers start from: the nodes of each sentence, in the order of the text, and its linked pairs."""
    for arguments, heads, tails in zip(*((part.numpy() > 0) for part in scores), strict=True):
        start, end, label = arguments.transpose(1, 2, 0).nonzero()
        nodes = [(LABELS[i][1], j, k) for i, j, k in zip(label.tolist(), start.tolist(), end.tolist(), strict=True)]
        head, tail = heads | heads.T, tails | tails.T  # only cells i <= j hold anything
        one, other = (head[start[:, None], start] & tail[end[:, None], end]).nonzero()
        once = one < other
        yield nodes, list(zip(one[once].tolist(), other[once].tolist(), strict=True))


def recursive_cliques(chosen: frozenset[int], near: list[set[int]], deadline: float) -> set[frozenset[int]]:
    """The rule as the article has it: split at every pair that is not linked, into the neighbourhoods of both."""
    if time.process_time() > deadline:
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


def spelt_out(nodes: list[Span], cliques: Iterable[Iterable[int]]) -> Events:
    return {TYPE: [tuple([nodes[node] for node in sorted(clique)]) for clique in cliques]}


def by_networkx(scores: Scores) -> list[Events]:
    decoded: list[Events] = []
    for nodes, links in nodes_and_links(scores):
        graph = nx.Graph()
        graph.add_nodes_from(range(len(nodes)))
        graph.add_edges_from(links)
        decoded.append(spelt_out(nodes, nx.find_cliques(graph)))
    return decoded


def by_recursion(scores: Scores, limit: float) -> tuple[list[Events], float]:
    """Events of as many sentences as the time allows, and the sentences/s (an upper bound when there are none)."""
    begin = time.process_time()
    decoded: list[Events] = []
    try:
        for nodes, links in nodes_and_links(scores):
            cliques = recursive_cliques(frozenset(range(len(nodes))), neighbours(len(nodes), links), begin + limit)
            decoded.append(spelt_out(nodes, cliques))
    except OutOfTime:
        pass
    return decoded, max(len(decoded), 1) / (time.process_time() - begin)


def by_kexue(scores: Scores, batch: int) -> list[Events]:
    decoded: list[Events] = []
    for first in range(0, len(scores[0]), batch):
        arguments, heads, tails = (part[first : first + batch] for part in scores)
        decoded += decode_event_batch(arguments, heads, tails, LABELS, max_nodes=30, max_events=100_000)
    return decoded


def in_any_order(decoded: list[Events]) -> list[list[tuple[Span, ...]]]:
    return [sorted(events[TYPE]) for events in decoded]


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call, by the processor's clock: other processes do not count."""
    calls, seconds = timeit.Timer(function, timer=time.process_time).autorange()
    return seconds / calls


def measure(nodes: int, kind: float | str, batch: int, count: int, repeats: int, limit: float) -> dict[str, Any]:
    """One row of the table."""
    scores, graphs = sentences(nodes, kind, count)
    edges = matrices(graphs)
    arguments, heads, tails = scores
    some = arguments[:CHECKED], heads[:CHECKED], tails[:CHECKED]
    expected = in_any_order(by_networkx(some))
    assert in_any_order(by_kexue(some, batch)) == expected
    recursive, speed = by_recursion(some, limit)
    assert in_any_order(recursive) == expected[: len(recursive)]

    def our_arrays() -> None:
        for first in range(0, count, batch):
            batched_maximal_cliques(edges[first : first + batch])

    def our_cliques() -> list[tuple[int, ...]]:
        cliques: list[tuple[int, ...]] = []
        for first in range(0, count, batch):
            _, members, ends = batched_maximal_cliques(edges[first : first + batch])
            listed = tuple(members.tolist())
            cliques += [listed[begin:end] for begin, end in pairwise([0, *ends.tolist()])]
        return cliques

    runs = {
        "kexue": lambda: timed(lambda: by_kexue(scores, batch)),
        "networkx": lambda: timed(lambda: by_networkx(scores)),
        "our arrays": lambda: timed(our_arrays),
        "our cliques": lambda: timed(our_cliques),
        "their cliques": lambda: timed(lambda: [list(nx.find_cliques(graph)) for graph in graphs]),
    }
    times = in_turn(runs, repeats)
    ours, spread = median_and_spread([count / seconds for seconds in times["kexue"]])
    theirs, _ = median_and_spread([count / seconds for seconds in times["networkx"]])
    cliques, arrays = (
        median_and_spread([them / us for us, them in zip(times[name], times["their cliques"], strict=True)])[0]
        for name in ("our cliques", "our arrays")
    )
    bound = "" if recursive else ">"
    return {
        "nodes": nodes,
        "density": kind,
        "batch": batch if count <= batch or batch == 1 else f"{count} by {batch}",
        "events a sentence": round(sum(map(len, expected)) / len(expected), 1),
        "kexue, sentences/s": round(ours),
        "spread": round(spread),
        "networkx, sentences/s": round(theirs),
        "ratio": f"{ours / theirs:.1f}",
        "recursion, sentences/s": f"{'<' if bound else ''}{speed:.3g}",
        "sentences it did": f"{len(recursive)} of {len(expected)}",
        "ratio to it": f"{bound}{ours / speed:.3g}",
        "cliques only, ratio to networkx": f"{cliques:.1f}",
        "as arrays": f"{arrays:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the figures to")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.0, help="seconds for the recursion on a row")
    parser.add_argument("--sentences", type=int, default=1000, help="how many to decode in batches of 64")
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 20, 30])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        measure(nodes, kind, batch, count, options.repeats if count <= CHECKED else 1, options.limit)
        for batch, count in ((64, 64), (64, options.sentences), (1, 64))
        for nodes in options.nodes
        for kind in (0.5, 0.7, 0.9, "shared")
    ]
    report("event decoding", rows, options.json)


if __name__ == "__main__":
    main()
