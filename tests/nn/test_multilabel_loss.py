"""The sparse loss against the formula as it stands, in the places where the usual sparse form fails."""

import math

import pytest
import torch
from torch import Tensor

from kexue.errors import InputError
from kexue.nn.heads import FactoredScores, ProductScores
from kexue.nn.losses import LabelSmoothing, dense_multilabel_pointer_loss, multilabel_pointer_loss


def random_labels(shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """Listed and 0/1 labels; the list has repetitions and padding, one row has nothing but padding."""
    batch, heads, length, _ = shape
    listed = torch.full((batch, count + 3, 3), -1)
    targets = torch.zeros(shape, dtype=torch.bool)
    for row in range(1, batch):
        cells = torch.stack([torch.randint(n, (count,)) for n in (heads, length, length)], 1)
        listed[row, :count] = cells
        listed[row, count] = cells[0]
        targets[row, cells[:, 0], cells[:, 1], cells[:, 2]] = True
    return listed, targets


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("factored", [False, True])
def test_sparse_equals_dense(dtype: torch.dtype, tolerance: float, scale: float, factored: bool) -> None:
    torch.manual_seed(0)
    shape = (3, 4, 6, 6)
    parts = FactoredScores(
        *(scale * torch.randn(size, dtype=dtype).requires_grad_() for size in ((3, 6, 6), (3, 4, 6), (3, 4, 6)))
    )
    leaves = [part.detach().requires_grad_() for part in (parts.shared, parts.start, parts.end)]
    listed, targets = random_labels(shape, 5)
    scores = FactoredScores(*leaves) if factored else FactoredScores(*leaves).dense()
    sparse = multilabel_pointer_loss(scores, listed)
    dense = dense_multilabel_pointer_loss(FactoredScores(*leaves).dense(), targets)
    torch.testing.assert_close(sparse, dense, atol=tolerance, rtol=tolerance)
    for found, expected in zip(torch.autograd.grad(sparse, leaves), torch.autograd.grad(dense, leaves), strict=True):
        torch.testing.assert_close(found, expected, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_products_give_the_loss_of_the_full_scores(smoothing: float) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(3, 4, 6, 5).double().requires_grad_() for _ in range(2)]
    scores = ProductScores(torch.stack(leaves, 2), torch.ones(6, 6).bool().triu())
    listed, _ = random_labels((3, 4, 6, 6), 5)
    listed = torch.where(listed[..., 1:2] <= listed[..., 2:], listed, -torch.ones_like(listed))
    found = multilabel_pointer_loss(scores, listed, smoothing)
    expected = multilabel_pointer_loss(scores.dense(), listed, smoothing)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("factored", [False, True])
def test_smoothed_equals_the_formula_for_soft_labels(factored: bool, smoothing: float) -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(size).double().requires_grad_() for size in ((3, 6, 6), (3, 4, 6), (3, 4, 6))]
    scores = FactoredScores(*leaves)
    listed, targets = random_labels((3, 4, 6, 6), 5)
    found = LabelSmoothing(smoothing).spans(scores if factored else scores.dense(), listed)
    expected = dense_multilabel_pointer_loss(scores.dense(), (1 - smoothing) * targets.double())
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_smoothed_positives_stop_at_a_score() -> None:
    best = math.log(9) / 2
    scores = torch.full((1, 1, 3, 3), -60.0, dtype=torch.float64)
    scores[0, 0, 0, 1] = best
    scores.requires_grad_()
    labels = torch.tensor([[[0, 0, 1]]])
    loss = multilabel_pointer_loss(scores, labels, smoothing=0.1)
    assert loss.item() == pytest.approx(2 * math.log1p(0.3), rel=1e-12)
    assert torch.autograd.grad(loss, scores)[0].abs().max() < 1e-12
    with pytest.raises(InputError, match="to below 0"):
        multilabel_pointer_loss(scores, labels, smoothing=0.5)
    with pytest.raises(InputError, match="spans take smoothing alone"):
        LabelSmoothing(0.1, prior=[0.5, 0.5]).spans(scores, labels)


@pytest.mark.parametrize("level", [5.0, 16.0, 20.0, 40.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_floor_when_saturated(level: float, dtype: torch.dtype) -> None:
    """One positive at +s, all else at -s: the usual sparse form returns s - 16 and stops learning."""
    scores = torch.full((1, 1, 4, 4), -level, dtype=dtype)
    scores[0, 0, 1, 2] = level
    loss = multilabel_pointer_loss(scores, torch.tensor([[[0, 1, 2]]]))
    expected = math.log1p(math.exp(-level)) + math.log1p(15 * math.exp(-level))
    assert 0 <= loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_no_labels_at_all(count: int) -> None:
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = multilabel_pointer_loss(scores, torch.full((2, count, 3), -1))
    loss.backward()
    torch.testing.assert_close(loss, dense_multilabel_pointer_loss(scores, torch.zeros(2, 3, 4, 4)))
    assert torch.isfinite(scores.grad).all()
    assert scores.grad.any()


def test_every_cell_positive() -> None:
    scores = torch.randn(1, 1, 2, 2, requires_grad=True)
    labels = torch.tensor([[[0, i, j] for i in range(2) for j in range(2)]])
    loss = multilabel_pointer_loss(scores, labels)
    loss.backward()
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-scores).sum()))
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, factored: bool) -> None:
    parts = [(20 * torch.randn(size)).to(dtype).requires_grad_() for size in ((2, 5, 5), (2, 3, 5), (2, 3, 5))]
    hidden = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    shared = parts[0].masked_fill(hidden, torch.finfo(dtype).min)
    scores = FactoredScores(shared, parts[1], parts[2])
    labels = torch.tensor([[[0, 1, 2], [2, 0, 4]], [[1, 3, 3], [-1, -1, -1]]])
    loss = multilabel_pointer_loss(scores if factored else scores.dense(), labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert all(torch.isfinite(part.grad).all() for part in parts)


def test_never_negative() -> None:
    torch.manual_seed(0)
    for _ in range(50):
        shape = (2, 2, 4, 4)
        listed, _ = random_labels(shape, 3)
        assert multilabel_pointer_loss(torch.randn(shape) * 10 * torch.rand(1), listed) >= 0


def test_a_row_of_padding_costs_nothing() -> None:
    least = torch.finfo(torch.float32).min
    parts = FactoredScores(torch.full((1, 4, 4), least), torch.randn(1, 2, 4), torch.randn(1, 2, 4).requires_grad_())
    loss = multilabel_pointer_loss(parts, torch.full((1, 1, 3), -1))
    loss.backward()
    assert loss == 0
    assert torch.isfinite(parts.end.grad).all()
