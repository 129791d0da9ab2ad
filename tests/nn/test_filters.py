"""Filters of next-token scores: what exactly they leave, by hand and beside those of transformers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kexue.errors import InputError
from kexue.nn.decoding import no_repeat_ngram, repetition_penalty, top_k_filter, top_p_filter


def support(scores: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in scores]


@pytest.mark.parametrize(
    ("p", "crossing", "without"),
    [(0.3, 1, 1), (0.6, 2, 1), (0.7, 2, 1), (0.8, 3, 2), (0.95, 4, 3), (1.0, 4, 4)],
)
def test_top_p_keeps_the_exact_tokens(p: float, crossing: int, without: int) -> None:
    order = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    logits = torch.empty(2, 4).scatter(1, order, torch.tensor([0.5, 0.25, 0.15, 0.1]).log().expand(2, 4))
    for keep_crossing, count in ((True, crossing), (False, without)):
        expected = [sorted(row[:count].tolist()) for row in order]
        assert support(top_p_filter(logits, p, keep_crossing)) == expected


def test_top_p_that_is_reached_exactly_crosses_there() -> None:
    assert len(support(top_p_filter(torch.zeros(1, 4), 0.5))[0]) == 2
    assert len(support(top_p_filter(torch.zeros(1, 4), 0.5, keep_crossing=False))[0]) == 1


def test_top_p_of_a_flat_distribution_needs_more_than_the_first_tokens() -> None:
    kept = top_p_filter(torch.stack((torch.zeros(5000), -torch.arange(5000.0))), 0.9)
    assert [len(row) for row in support(kept)] == pytest.approx([4500, 3], abs=1)


def test_top_k_keeps_exactly_k_among_equals() -> None:
    assert [len(row) for row in support(top_k_filter(torch.zeros(2, 7), 3))] == [3, 3]
    assert support(top_k_filter(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2)) == [[1, 2]]
    assert torch.equal(top_k_filter(torch.arange(3.0), 9), torch.arange(3.0))


def test_no_repeat_ngram_by_hand() -> None:
    tokens = torch.tensor([[1, 2, 3, 1, 2], [1, 1, 1, 1, 1], [0, 1, 2, 3, 4]])
    scores = torch.zeros(3, 5)
    assert support(no_repeat_ngram(scores, tokens, 3)) == [[0, 1, 2, 4], [0, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert support(no_repeat_ngram(scores, tokens, 1)) == [[0, 4], [0, 2, 3, 4], []]
    assert no_repeat_ngram(scores, tokens[:, :1], 2) is scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_filters_keep_their_input_and_dtype(dtype: torch.dtype) -> None:
    logits, tokens = torch.randn(4, 30).to(dtype), torch.randint(30, (4, 12))
    before = logits.clone()
    for filtered in (
        top_k_filter(logits, 5),
        top_p_filter(logits, 0.7),
        repetition_penalty(logits, tokens, 1.3),
        no_repeat_ngram(logits, tokens, 1),
    ):
        assert filtered.dtype == dtype
        assert not torch.equal(filtered, before)
        assert torch.equal(logits, before)


def test_filters_match_transformers() -> None:
    from transformers.generation import logits_process as peer

    torch.manual_seed(0)
    logits, tokens = 2 * torch.randn(6, 2000), torch.randint(2000, (6, 40))
    tokens[:, 20:] = tokens[:, :20]
    cases = [
        (peer.TopKLogitsWarper(50), top_k_filter(logits, 50)),
        (peer.TopPLogitsWarper(0.6), top_p_filter(logits, 0.6)),
        (peer.RepetitionPenaltyLogitsProcessor(1.4), repetition_penalty(logits, tokens, 1.4)),
        (peer.NoRepeatNGramLogitsProcessor(3), no_repeat_ngram(logits, tokens, 3)),
    ]
    for process, ours in cases:
        torch.testing.assert_close(ours, process(tokens, logits.clone()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda: top_k_filter(torch.zeros(1, 3), 0),
        lambda: top_p_filter(torch.zeros(1, 3), 0.0),
        lambda: repetition_penalty(torch.zeros(1, 3), torch.zeros(1, 1, dtype=torch.long), 0.0),
        lambda: no_repeat_ngram(torch.zeros(1, 3), torch.zeros(1, 1, dtype=torch.long), 0),
    ],
)
def test_filters_refuse_values_out_of_range(call: Callable[[], Tensor]) -> None:
    with pytest.raises(InputError, match="=0"):
        call()
