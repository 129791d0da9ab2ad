"""Counts of typed spans by hand, and spans from scores."""

import pytest
import torch

from kexue.nn.decoding import TypedScores, positive_spans

GOLD = [[("a", 0, 1), ("a", 3, 5), ("b", 6, 7)], [("b", 0, 2)]]
FOUND = [[("a", 0, 1), ("b", 3, 5)], [("b", 0, 2), ("b", 4, 5)]]
EXPECTED = {
    "f1": 4 / 8,
    "precision": 2 / 4,
    "recall": 2 / 4,
    "f1/a": 2 / 3,
    "precision/a": 1,
    "recall/a": 1 / 2,
    "f1/b": 2 / 5,
    "precision/b": 1 / 3,
    "recall/b": 1 / 2,
    "macro_f1": (2 / 3 + 2 / 5) / 2,
    "macro_precision": (1 + 1 / 3) / 2,
    "macro_recall": 1 / 2,
}


def plain(scores: TypedScores) -> dict[str, float]:
    return {name: value.item() for name, value in scores.compute().items()}


def test_scores_by_hand() -> None:
    scores = TypedScores(["a", "b", "c"])
    scores.update(FOUND, GOLD)
    assert plain(scores) == pytest.approx(EXPECTED)


def test_repetitions_earn_once_and_cost_once() -> None:
    scores = TypedScores(["a", "b", "c"])
    scores.update([group * 3 for group in FOUND], [group * 2 for group in GOLD])
    assert plain(scores) == pytest.approx(EXPECTED)


def test_the_right_span_in_the_wrong_text_earns_nothing() -> None:
    scores = TypedScores(["a", "b"])
    scores.update([GOLD[1], GOLD[0]], GOLD)
    assert plain(scores)["f1"] == 0


def test_positive_spans() -> None:
    scores = -torch.ones(2, 2, 4, 4)
    scores[0, 1, 1, 2], scores[0, 0, 1, 2], scores[0, 0, 0, 1], scores[1, 0, 2, 2] = 1, 2, 3, 4
    scores[1, 1, 3, 1] = 5  # ends before it begins
    assert [sorted(row) for row in positive_spans(scores)] == [[(0, 0, 1), (0, 1, 2), (1, 1, 2)], [(0, 2, 2)]]
    places = torch.tensor([[False, True, True, True]] * 2)
    assert [sorted(row) for row in positive_spans(scores, places)] == [[(0, 1, 2), (1, 1, 2)], [(0, 2, 2)]]
    with pytest.warns(UserWarning, match="max_spans=1: the best-scoring ones"):
        assert sorted(positive_spans(scores, None, max_spans=1)[0]) == [(0, 0, 1), (1, 1, 2)]
