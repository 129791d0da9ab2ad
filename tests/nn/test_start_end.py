"""Spans by the classes of first and last tokens, and the trunks below: by hand, and blind to padding."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.errors import InputError
from kexue.nn.heads import StartEndHead, decode_start_end, start_end_classes, start_end_loss
from kexue.nn.trunks import ConvolutionTrunk, LSTMTrunk


def decoded(starts: list[int], ends: list[int], length: int | None = None) -> list[tuple[int, int, int]]:
    mask = torch.arange(len(starts))[None] < (len(starts) if length is None else length)
    return decode_start_end(torch.tensor([starts]), torch.tensor([ends]), mask)[0]


@pytest.mark.parametrize(
    ("starts", "ends", "spans"),
    [
        ([0, 1, 0, 0, 2], [0, 0, 0, 1, 2], [(0, 1, 3), (1, 4, 4)]),
        ([1, 0, 1, 0], [0, 0, 0, 1], [(0, 0, 3), (0, 2, 3)]),  # nested starts, one end for both
        ([1, 2, 0, 0], [0, 0, 2, 1], [(0, 0, 3), (1, 1, 2)]),  # one in the other
        ([0, 1, 0, 0], [1, 0, 2, 0], []),  # the end is missing
        ([1, 0, 0, 0], [0, 1, 1, 0], [(0, 0, 1)]),  # the nearest
        ([0, 0, 0, 0], [0, 0, 0, 0], []),
    ],
)
def test_decoding_by_hand(starts: list[int], ends: list[int], spans: list[tuple[int, int, int]]) -> None:
    assert sorted(decoded(starts, ends), key=lambda span: span[1]) == spans


def test_padding_begins_and_ends_nothing() -> None:
    assert decoded([1, 0, 1, 1], [0, 0, 1, 1], length=2) == []


def test_spans_come_back() -> None:
    spans = torch.tensor([[(1, 0, 0), (0, 2, 4), (1, 5, 6)], [(2, 1, 1), (-1, -1, -1), (-1, -1, -1)]])
    starts, ends = start_end_classes(spans, 8)
    assert starts.tolist() == [[2, 0, 1, 0, 0, 2, 0, 0], [0, 3, 0, 0, 0, 0, 0, 0]]
    found = decode_start_end(starts, ends, torch.ones(2, 8, dtype=torch.bool))
    assert [sorted(row, key=lambda span: span[1]) for row in found] == [
        [tuple(span) for span in row if span[0] >= 0] for row in spans.tolist()
    ]


@pytest.mark.parametrize(("label", "width"), [("hard", 1), ("soft", 4)])
def test_the_head_is_the_formula(label: str, width: int) -> None:
    torch.manual_seed(0)
    head = StartEndHead(8, 3, label)  # type: ignore[arg-type]
    features, gold = torch.randn(2, 5, 8), torch.randint(0, 4, (2, 5))
    for starts in (gold, None):
        first, last = head(features, starts)
        if label == "hard":
            told = (first.argmax(-1) if starts is None else starts)[..., None].float()
        else:
            told = first.softmax(-1) if starts is None else torch.eye(4)[starts]
        assert told.shape[-1] == width
        inner = torch.cat([features, told], -1) @ head.inner.weight.T + head.inner.bias
        expected = F.layer_norm(inner.tanh(), (8 + width,)) @ head.end.weight.T + head.end.bias
        torch.testing.assert_close(last, expected)
    with pytest.raises(InputError, match="use one of hard, soft"):
        StartEndHead(8, 3, "gold")  # type: ignore[arg-type]


def test_the_loss_counts_each_sentence_once_and_no_padding() -> None:
    torch.manual_seed(0)
    starts, ends = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    right = torch.randint(0, 3, (2, 4)), torch.randint(0, 3, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    rows = [
        F.cross_entropy(starts[row, :n], right[0][row, :n]) + F.cross_entropy(ends[row, :n], right[1][row, :n])
        for row, n in enumerate((4, 1))
    ]
    torch.testing.assert_close(start_end_loss(starts, ends, right, mask), (rows[0] + rows[1]) / 2)


@pytest.mark.parametrize("make", [LSTMTrunk, ConvolutionTrunk])
def test_trunks_see_no_padding(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    trunk = make(8).eval()
    hidden = torch.randn(3, 7, 8, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])

    def run(values: Tensor) -> Tensor:
        return trunk(values, mask)

    alone = trunk(hidden[1:2, :3], mask[1:2, :3])
    torch.testing.assert_close(run(hidden)[1:2, :3], alone)
    noisy = torch.where(mask[..., None], hidden, torch.full_like(hidden, 9.0))
    torch.testing.assert_close(run(noisy)[mask], run(hidden)[mask])
    run(hidden)[mask].sum().backward()
    assert all(parameter.grad is not None for parameter in trunk.parameters())
    far = run(torch.cat([hidden[:, :6], hidden[:, 6:] + 1], 1))[0, 3] - run(hidden)[0, 3]
    assert far.abs().max() > 0, "a token does not hear of one three places on"


def test_the_convolutions_applied_again_share_their_parameters() -> None:
    counts = [sum(p.numel() for p in ConvolutionTrunk(8, iterations=n).parameters()) for n in (1, 4)]
    assert counts[0] == counts[1]
    with pytest.raises(InputError, match="use 1 or more"):
        ConvolutionTrunk(8, iterations=0)
    with pytest.raises(InputError, match="use an even number"):
        LSTMTrunk(7)
