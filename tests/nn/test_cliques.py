"""Maximal cliques against networkx, and the graphs that make such searches explode."""

import networkx as nx
import numpy as np
import pytest

from kexue.errors import InputError
from kexue.nn.decoding import batched_maximal_cliques, maximal_cliques


def matrix(graph: nx.Graph) -> np.ndarray:
    return nx.to_numpy_array(graph, nodelist=range(len(graph)), dtype=bool)


def expected(graph: nx.Graph) -> list[tuple[int, ...]]:
    return sorted(tuple(sorted(clique)) for clique in nx.find_cliques(graph))


@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_equal_to_networkx_on_random_graphs(density: float) -> None:
    for seed in range(60):
        graph = nx.gnp_random_graph(1 + seed % 24, density, seed=seed)
        assert sorted(maximal_cliques(matrix(graph))) == expected(graph)


@pytest.mark.parametrize("nodes", [31, 32, 33, 63, 64])
def test_borders_of_a_machine_word(nodes: int) -> None:
    graph = nx.gnp_random_graph(nodes, 0.4, seed=nodes)
    assert sorted(maximal_cliques(matrix(graph))) == expected(graph)
    assert maximal_cliques(np.ones((nodes, nodes), bool)) == [tuple(range(nodes))]


def test_a_batch_of_unequal_graphs() -> None:
    graphs = [nx.gnp_random_graph(n, 0.6, seed=n) for n in (3, 12, 1, 7, 20)]
    padded = np.ones((5, 20, 20), bool)  # what lies beyond a graph's size must not matter
    for row, graph in zip(padded, graphs, strict=True):
        row[: len(graph), : len(graph)] = matrix(graph)
    owners, members, ends = batched_maximal_cliques(padded, np.array([len(graph) for graph in graphs]))
    assert (np.diff(owners) >= 0).all()
    cliques = [tuple(part.tolist()) for part in np.split(members, ends[:-1])]
    for number, graph in enumerate(graphs):
        assert sorted(c for c, owner in zip(cliques, owners, strict=True) if owner == number) == expected(graph)


def cliques_of_each(graphs: list[nx.Graph], cap: int | None = None) -> list[list[tuple[int, ...]]]:
    owners, members, ends = batched_maximal_cliques(np.stack([matrix(graph) for graph in graphs]), cap=cap)
    cliques = [tuple(part.tolist()) for part in np.split(members, ends[:-1])]
    return [
        sorted(c for c, owner in zip(cliques, owners, strict=True) if owner == number) for number in range(len(graphs))
    ]


def test_twins_are_merged_and_come_back() -> None:
    """Cliques 0..8, 7..15 and 14..19 share nodes: all but these are twins. A complete graph is one point."""
    shared = nx.compose_all([nx.complete_graph(range(*ends)) for ends in ((0, 9), (7, 16), (14, 20))])
    graphs = [
        shared,
        nx.complete_graph(20),
        nx.empty_graph(20),
        nx.cycle_graph(20),
        nx.gnp_random_graph(20, 0.7, seed=3),
    ]
    assert cliques_of_each(graphs) == [expected(graph) for graph in graphs]


@pytest.mark.parametrize("nodes", [8, 11, 12, 16, 33, 56, 57, 64])
def test_graph_numbers_and_nodes_in_one_word(nodes: int) -> None:
    graphs = [nx.gnp_random_graph(nodes, 0.4, seed=seed) for seed in range(6)]
    assert cliques_of_each(graphs) == [expected(graph) for graph in graphs]


def test_a_cap_holds_for_each_graph_of_a_batch() -> None:
    graphs = [nx.gnp_random_graph(20, density, seed=7) for density in (0.1, 0.5, 0.6, 0.7, 0.8, 0.9)]
    for found, graph in zip(cliques_of_each(graphs, cap=30), graphs, strict=True):
        assert len(found) == min(30, len(expected(graph)))
        assert set(found) <= set(expected(graph))


def test_no_nodes_no_cliques() -> None:
    assert maximal_cliques(np.zeros((0, 0), bool)) == []
    assert maximal_cliques(np.zeros((1, 1), bool)) == [(0,)]
    assert [len(part) for part in batched_maximal_cliques(np.zeros((0, 5, 5), bool))] == [0, 0, 0]


def test_the_diagonal_is_ignored() -> None:
    edges = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1]], bool)
    assert sorted(maximal_cliques(edges)) == [(0, 1), (2,)]


def test_a_cap_bounds_the_worst_case() -> None:
    """20 triples of mutual strangers: 3^20 maximal cliques, each with one of every triple."""
    graph = matrix(nx.complete_multipartite_graph(*[3] * 20))
    cliques = maximal_cliques(graph, cap=500)
    assert len(cliques) == len(set(cliques)) == 500
    assert all(len({node // 3 for node in clique}) == 20 for clique in cliques)


def test_a_cap_that_is_not_reached_changes_nothing() -> None:
    graph = nx.gnp_random_graph(15, 0.7, seed=1)
    assert sorted(maximal_cliques(matrix(graph), cap=10_000)) == expected(graph)


@pytest.mark.parametrize("shape", [(65, 65), (3, 4), (5,)])
def test_wrong_matrices_are_explained(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="square matri"):
        maximal_cliques(np.zeros(shape, bool))
