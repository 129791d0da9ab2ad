"""Spans, pairs, votes, losses and scores of short answers, against searches and formulas written plainly."""

import math
from itertools import product

import pytest
import torch

from kexue.errors import InputError
from kexue.nn.decoding import AnswerScores, answer_f1, best_pairs, best_spans, best_threshold, exact_match, vote
from kexue.nn.heads import PairHead, SpanHead
from kexue.nn.losses.answer_span import pair_loss, position_loss


def random_rows(seed: int, rows: int = 4, length: int = 14) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of first and last tokens and of pairs, and places among which some are left out."""
    random = torch.Generator().manual_seed(seed)
    positions = torch.randn(2, rows, length, generator=random).log_softmax(-1)
    pairs = torch.randn(rows, length * length, generator=random).log_softmax(-1).view(rows, length, length)
    places = torch.rand(rows, length, generator=random) < 0.7
    places[:, :3] = False
    places[-1] = False
    return positions, pairs, places


@pytest.mark.parametrize(("seed", "longest", "count"), [(0, 1, 3), (1, 4, 1), (2, 5, 10), (3, 14, 400), (4, 99, 7)])
def test_spans_are_those_of_a_search_over_all(seed: int, longest: int, count: int) -> None:
    (first, last), pairs, places = random_rows(seed)
    for how in ("positions", "pairs"):
        if how == "positions":
            found = best_spans(first, last, places, longest, count)
        else:
            found = best_pairs(pairs, places, longest, count)
        for row, allowed in enumerate(places.tolist()):
            every = [
                (float(first[row, i] + last[row, j]) if how == "positions" else float(pairs[row, i, j]), i, j)
                for i, j in product(range(len(allowed)), repeat=2)
                if allowed[i] and allowed[j] and i <= j < i + longest
            ]
            wanted = sorted(every, key=lambda span: -span[0])[:count]
            spans = list(zip(*(part[row].tolist() for part in found), strict=True))
            spans = [span for span in spans if span[0] > -math.inf]
            assert [span[1:] for span in spans] == [span[1:] for span in wanted]
            assert [span[0] for span in spans] == pytest.approx([span[0] for span in wanted])


def test_a_span_needs_a_length() -> None:
    (first, last), pairs, places = random_rows(0)
    with pytest.raises(InputError, match="max_length=0"):
        best_spans(first, last, places, 0)
    with pytest.raises(InputError, match="count=0"):
        best_pairs(pairs, places, 3, 0)


def test_losses_by_the_formula() -> None:
    """With one target cross-entropy; with several their mean, or that of the event that any of them comes true."""
    random = torch.Generator().manual_seed(0)
    scores, pairs = torch.randn(3, 2, 6, generator=random), torch.randn(3, 6, 6, generator=random)
    targets = torch.tensor([[[2, 3], [2, 5], [-1, -1]], [[0, 0], [-1, -1], [-1, -1]], [[1, 4], [3, 4], [1, 4]]])
    first, last = scores.softmax(-1).unbind(1)
    pair = pairs.flatten(1).softmax(-1).view_as(pairs)
    cells = [[(2, 3), (2, 5)], [(0, 0)], [(1, 4), (3, 4)]]
    both = [[float(first[row, i] * last[row, j]) for i, j in listed] for row, listed in enumerate(cells)]
    one = [[float(pair[row, i, j]) for i, j in listed] for row, listed in enumerate(cells)]
    wanted = -sum(math.log(sum(values)) for values in both) / 3 / 2
    assert position_loss(scores, targets).item() == pytest.approx(wanted, rel=1e-5)
    wanted = -sum(math.log(sum(values)) for values in one) / 3
    assert pair_loss(pairs, targets).item() == pytest.approx(wanted, rel=1e-5)
    targets[2, 2] = -1
    for values, found in ((both, 2 * position_loss(scores, targets, "mean")), (one, pair_loss(pairs, targets, "mean"))):
        mean = -sum(sum(map(math.log, row)) / len(row) for row in values) / 3
        assert found.item() == pytest.approx(mean, rel=1e-5)
    entropy = sum(torch.nn.functional.cross_entropy(scores[:, side], targets[:, 0, side]) for side in (0, 1)) / 2
    for several in ("any", "mean"):
        assert position_loss(scores, targets[:, :1], several).item() == pytest.approx(float(entropy), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_leave_out_what_is_no_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 8).to(dtype)
    places = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    positions = SpanHead(8).to(dtype)(hidden, places).float().softmax(-1)
    assert (positions[0, 0] > 0).tolist() == [True, False, True, True, False]
    assert positions[1].tolist() == [[1, 0, 0, 0, 0]] * 2
    pairs = PairHead(8, 4).to(dtype)(hidden, places).float().flatten(1).softmax(-1).view(2, 5, 5)
    assert (pairs[0] > 0).nonzero().tolist() == [[0, 0], [2, 2], [2, 3], [3, 3]]
    assert (pairs[1] > 0).nonzero().tolist() == [[0, 0]]


def test_one_clear_find_beats_several_doubtful_ones() -> None:
    found = [{"a": 0.7, "b": 0.2}, {"b": 0.2}, {"b": 0.2}, {"b": 0.2, "c": 0.0}]
    ranked = vote(found)
    assert list(ranked) == ["a", "b", "c"]
    assert ranked["a"] == pytest.approx(0.288, abs=5e-4)
    assert ranked["b"] == pytest.approx(0.089, abs=5e-4)
    assert vote(found, "best") == {"a": 0.7, "b": 0.2, "c": 0.0}
    assert vote([]) == {}


def test_answers_are_compared_as_cmrc_does() -> None:
    assert exact_match("《红楼梦》", ["红楼梦"]) == 1
    assert exact_match("3,500 米", ["3500米"]) == 0
    assert answer_f1("红楼梦的作者", ["作者是曹雪芹", "红楼"]) == pytest.approx(2 * 2 / (6 + 2))
    assert answer_f1("在1998年5月", ["1998年"]) == pytest.approx(2 * 2 / (5 + 2))  # a number is one word
    assert answer_f1("甲乙丙丁", ["丁丙乙甲"]) == pytest.approx(0.25)  # one string, not a bag of characters
    for text, gold, right in (("", [], 1), ("甲", [], 0), ("", ["甲"], 0)):
        assert exact_match(text, gold) == answer_f1(text, gold) == right


def test_answers_are_compared_as_sogou_does() -> None:
    assert exact_match("ＡＢＣ　１２", ["abc12"], "characters") == 1
    assert exact_match("李白、杜甫", ["杜甫 李白"], "characters") == 1  # the same words
    assert exact_match("李白杜甫", ["杜甫李白"], "characters") == 0
    assert answer_f1("李白杜甫", ["杜甫李白"], "characters") == 1
    assert answer_f1("3米高", ["3米", "高度3.5米"], "characters") == pytest.approx(0.8)
    assert answer_f1("。", ["甲"], "characters") == 0


def test_the_threshold_is_the_best_of_all() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(30):
        margins = torch.randint(-3, 4, (12,), generator=random).double()
        answered, none = torch.rand(12, generator=random).double(), (torch.rand(12, generator=random) < 0.4).double()

        def total(threshold: float) -> float:
            return float(torch.where(margins > threshold, answered, none).sum())  # noqa: B023

        tried = max(total(value) for value in [-9.0, *(margins + 0.25).tolist()])
        assert total(best_threshold(margins, answered, none)) == pytest.approx(tried)


def test_scores_withhold_what_is_not_sure() -> None:
    scores = AnswerScores(abstains=True)
    scores.update(["甲", "乙"], [["甲"], []], [2.0, 0.5])
    scores.update(["丙"], [["丁"]], [1.0])
    found = scores.compute()
    assert found["threshold"] == pytest.approx(0.75)
    assert found["f1"] == found["exact_match"] == found["average"] == pytest.approx(2 / 3)
    assert found["answerable_f1"] == 0.5
    assert found["unanswerable_accuracy"] == 1
    scores.threshold = 3.0
    assert scores.compute()["f1"] == pytest.approx(1 / 3)
    sure = AnswerScores()
    sure.update(["甲", "乙"], [["甲"], []], [-9.0, -float("inf")])
    assert sure.compute()["f1"] == 0.5
