"""Scores of arguments by hand, by brute force, and dealt out over ranks."""

import itertools
import random

import pytest
import torch

from kexue.nn.decoding import ArgumentScores
from kexue.nn.decoding.argument_metrics import character_f1, earned, subsequence_share


def test_parts_of_a_text_earn_a_part() -> None:
    assert character_f1("北京市", "北京") == pytest.approx(0.8)
    assert character_f1("京北", "北京") == 1
    assert subsequence_share("京北", "北京") == 0.5
    assert subsequence_share("天安门广场", "天门场") == pytest.approx(6 / 8)
    assert character_f1("", "") == subsequence_share("", "") == 0


def test_subsequences_are_the_longest() -> None:
    rng = random.Random(0)
    for _ in range(100):
        one, other = ("".join(rng.choices("abc", k=rng.randint(1, 7))) for _ in range(2))
        parts = [
            {"".join(part) for size in range(len(text) + 1) for part in itertools.combinations(text, size)}
            for text in (one, other)
        ]
        longest = max(map(len, parts[0] & parts[1]))
        assert subsequence_share(one, other) == pytest.approx(2 * longest / (len(one) + len(other)))


def test_what_is_earned_is_the_best_of_all_ways() -> None:
    rng = random.Random(0)
    for _ in range(60):
        found, wanted = ([f"{i}" + "".join(rng.choices("ab", k=2)) for i in range(rng.randint(0, 3))] for _ in range(2))
        few, many = sorted((found, wanted), key=len)
        best = max(
            sum(character_f1(one, other) for one, other in zip(few, way, strict=True))
            for way in itertools.permutations(many, len(few))
        )
        assert earned(found, wanted) == pytest.approx(best)


def test_repetitions_earn_nothing_and_cost_nothing() -> None:
    gold = [[("a", "r", "北京"), ("a", "r", "北京")]]
    for predicted in ([("a", "r", "北京")], [("a", "r", "北京")] * 3):
        scores = ArgumentScores(["a"])
        scores.update([predicted], gold)
        assert scores.compute()["f1"] == 1
    scores.reset()
    scores.update([[("a", "r", "北京"), ("a", "r", "北京市"), ("a", "r", "京")]], gold)  # one gold text pays once
    assert {name: value.item() for name, value in scores.compute().items() if "_" not in name and "/" not in name} == (
        pytest.approx({"f1": 0.5, "precision": 1 / 3, "recall": 1.0})
    )


def test_figures_by_hand() -> None:
    scores = ArgumentScores(["a", "b", "c"], trigger_role="t")
    gold = [[("a", "t", "动"), ("a", "r", "甲乙"), ("a", "r", "丙"), ("b", "r", "丁")], [("c", "t", "动")]]
    found = [[("a", "r", "丙"), ("a", "r", "甲"), ("a", "s", "丁"), ("b", "t", "x")], []]
    scores.update(found, gold)
    figures = {name: round(value.item(), 5) for name, value in scores.compute().items()}
    third = 2 / 3
    assert figures["precision"] == figures["recall"] == round((1 + third) / 3, 5)
    assert figures["precision/a"] == round((1 + third) / 3, 5)
    assert figures["recall/a"] == round((1 + third) / 2, 5)
    assert (figures["recall/b"], figures["precision/b"]) == (0, 0)
    assert "f1/c" not in figures
    # The last text of each type and role: 甲 beside 丙, 丁 found alone, 丁 wanted alone.
    assert figures["lcs_f1"] == 0
    assert (figures["type_precision"], figures["type_recall"]) == (1, round(third, 5))
    with pytest.raises(KeyError):
        scores.update([[("d", "r", "x")]], [[]])


def test_scores_do_not_depend_on_the_deal() -> None:
    rng = random.Random(3)

    def draw() -> list[tuple[str, str, str]]:
        return [("a", rng.choice("rs"), "".join(rng.choices("甲乙丙丁", k=rng.randint(1, 5)))) for _ in range(4)]

    rows = [(draw(), draw()) for _ in range(60)]
    whole, parts = ArgumentScores(["a"]), [ArgumentScores(["a"]) for _ in range(3)]
    whole.update(*zip(*rows, strict=True))
    for number, row in enumerate(rows):
        parts[number % 3].update([row[0]], [row[1]])
    for name in ("counts", "subsequences", "kinds"):
        assert torch.equal(sum(getattr(part, name) for part in parts), getattr(whole, name))  # type: ignore[arg-type]
