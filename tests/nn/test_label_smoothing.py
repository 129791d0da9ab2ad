"""Smoothed cross-entropy against torch, the formula written plainly, and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kexue.errors import InputError
from kexue.nn.losses import LabelSmoothing, smoothed_binary_cross_entropy, smoothed_cross_entropy, smoothing_floor

CLASSES = 7


def items(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    scores = 3 * torch.randn(*shape, CLASSES, dtype=dtype)
    return scores.requires_grad_(), torch.randint(CLASSES, shape)


def by_the_formula(scores: Tensor, p: Tensor) -> Tensor:
    """-sum_k p_k log q_k, item by item."""
    return -(p * (scores - scores.exp().sum(-1, keepdim=True).log())).sum(-1)


@pytest.mark.parametrize("shape", [(11,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [None, -100, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_equals_torch(
    smoothing: float, weighted: bool, ignore_index: int | None, reduction: Any, shape: tuple[int, ...]
) -> None:
    scores, target = items(*shape)
    weight = torch.linspace(0.2, 2, CLASSES, dtype=torch.float64) if weighted else None
    if ignore_index is not None:
        target.view(-1)[::3] = ignore_index
    options = {"weight": weight, "reduction": reduction, "ignore_index": -100 if ignore_index is None else ignore_index}
    ours = smoothed_cross_entropy(scores, target, smoothing, **options)
    theirs = F.cross_entropy(scores.movedim(-1, 1), target, label_smoothing=smoothing, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad(loss.sum(), scores)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_soft_targets_equal_torch(weighted: bool) -> None:
    scores, _ = items(4, 5)
    target = torch.rand(4, 5, CLASSES, dtype=torch.float64).softmax(-1)
    weight = torch.linspace(0.2, 2, CLASSES, dtype=torch.float64) if weighted else None
    ours = smoothed_cross_entropy(scores, target, 0.2, weight=weight)
    theirs = F.cross_entropy(scores.movedim(-1, 1), target.movedim(-1, 1), weight, label_smoothing=0.2)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.05, 0.1, 0.3])
def test_the_other_convention_gives_the_true_class_no_share(smoothing: float) -> None:
    scores, target = items(9)
    p = torch.full((9, CLASSES), smoothing / (CLASSES - 1), dtype=torch.float64)
    p[torch.arange(9), target] = 1 - smoothing
    ours = smoothed_cross_entropy(scores, target, smoothing, convention="others", reduction="none")
    torch.testing.assert_close(ours, by_the_formula(scores, p), rtol=0, atol=1e-12)
    same = smoothed_cross_entropy(scores, target, smoothing * CLASSES / (CLASSES - 1), reduction="none")
    torch.testing.assert_close(ours, same, rtol=0, atol=1e-12)


def test_a_prior_spreads_the_mass() -> None:
    scores, target = items(9)
    prior = [0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 0.0]
    p = 0.8 * F.one_hot(target, CLASSES).double() + 0.2 * torch.tensor(prior, dtype=torch.float64)
    ours = smoothed_cross_entropy(scores, target, 0.2, prior=prior, reduction="none")
    torch.testing.assert_close(ours, by_the_formula(scores, p), rtol=0, atol=1e-12)


@pytest.mark.parametrize("convention", ["all", "others"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_impossible_classes_get_no_mass(dtype: torch.dtype, convention: Any) -> None:
    """The others behave as if these were not there, also where their scores are minus infinity."""
    scores, target = items(9)
    target = target.clamp(max=3)
    allowed = torch.arange(CLASSES) < 4
    scores = scores.detach().to(dtype).masked_fill(~allowed, -torch.inf).requires_grad_()
    ours = smoothed_cross_entropy(scores, target, 0.1, class_mask=allowed, convention=convention)
    few = smoothed_cross_entropy(scores[:, :4], target, 0.1, convention=convention)
    torch.testing.assert_close(ours, few, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)
    (gradient,) = torch.autograd.grad(ours, scores)
    assert gradient.isfinite().all()
    assert not gradient[:, 4:].any()
    some = allowed.expand(9, -1).clone()
    some[:5, 3] = target[:5] == 3  # and a class that only some of the items may have
    each = smoothed_cross_entropy(scores, target, class_mask=some, convention=convention, reduction="none")
    for item in range(9):
        alone = smoothed_cross_entropy(scores[item, some[item]], target[item], convention=convention)
        torch.testing.assert_close(each[item], alone, rtol=1e-6, atol=0)


def test_gradient_is_q_minus_p() -> None:
    scores, target = items(1)
    for smoothing in (0.0, 0.1, 1.0):
        (found,) = torch.autograd.grad(smoothed_cross_entropy(scores, target, smoothing), scores)
        p = (1 - smoothing) * F.one_hot(target, CLASSES).double() + smoothing / CLASSES
        torch.testing.assert_close(found, scores.detach().softmax(-1) - p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"weight": [1.0, 2, 3, 1, 1, 1, 0]}, {"convention": "others"}])
def test_gradcheck(options: dict[str, Any]) -> None:
    scores, target = items(4)
    target[1] = -100
    assert torch.autograd.gradcheck(lambda s: smoothed_cross_entropy(s, target, 0.1, **options), scores)


def test_least_value_and_where_it_is() -> None:
    assert smoothing_floor(7, 0.1) == pytest.approx(0.44609, abs=5e-6)
    assert smoothing_floor(10, 0.1) == pytest.approx(0.500, abs=5e-4)
    assert smoothing_floor(10, 0.0) == 0
    for convention, share in (("all", 0.1), ("others", 0.1 * CLASSES / (CLASSES - 1))):
        floor = smoothing_floor(CLASSES, 0.1, convention)
        gap = math.log1p(CLASSES * (1 - share) / share)
        best = torch.zeros(1, CLASSES, dtype=torch.float64)
        best[0, 2] = gap
        best.requires_grad_()
        loss = smoothed_cross_entropy(best, torch.tensor([2]), 0.1, convention=convention)
        assert loss.item() == pytest.approx(floor, rel=1e-12)
        assert torch.autograd.grad(loss, best)[0].abs().max() < 1e-12
    scores, target = items(1000)
    assert smoothed_cross_entropy(scores, target, 0.1, reduction="none").min() >= smoothing_floor(CLASSES, 0.1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("convention", ["all", "others"])
def test_padding_changes_nothing(convention: Any, weighted: bool) -> None:
    scores, target = items(2, 5)
    weight = torch.linspace(0.2, 2, CLASSES) if weighted else None
    longer = torch.cat((scores, 100 * torch.randn(2, 4, CLASSES, dtype=torch.float64)), 1)
    padded = torch.cat((target, torch.full((2, 4), -100)), 1)
    for reduction in ("mean", "sum"):
        options: dict[str, Any] = {"convention": convention, "weight": weight, "reduction": reduction}
        with_padding = smoothed_cross_entropy(longer, padded, **options)
        torch.testing.assert_close(with_padding, smoothed_cross_entropy(scores, target, **options), rtol=1e-14, atol=0)
    assert not smoothed_cross_entropy(longer, padded, reduction="none")[:, 5:].any()


def test_nothing_but_padding_is_zero_and_has_a_gradient() -> None:
    scores, target = items(3)
    loss = smoothed_cross_entropy(scores, torch.full_like(target, -100))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, scores)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    scores, target = items(64, dtype=torch.float32)
    low = (scores.detach() * 10).to(dtype)
    ours = smoothed_cross_entropy(low, target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, smoothed_cross_entropy(low.float(), target), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weighted = smoothed_cross_entropy(low, target, weight=torch.linspace(0.5, 1.5, CLASSES))
    expected = smoothed_cross_entropy(low.float(), target, weight=torch.linspace(0.5, 1.5, CLASSES))
    torch.testing.assert_close(weighted, expected, rtol=0, atol=0)


class Large(TorchDispatchMode):
    """Counts the operations that make new tensors of at least a given size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= self.size and result._base is None:
            self.made.append(str(function))
        return result


@pytest.mark.parametrize("convention", ["all", "others"])
def test_no_target_of_the_size_of_the_scores_is_made(convention: Any) -> None:
    scores = torch.randn(64, 50_000, requires_grad=True)
    target = torch.randint(50_000, (64,))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with (
        Large(scores.numel()) as large,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        smoothed_cross_entropy(scores, target, convention=convention)
    assert large.made == ["aten._log_softmax.default"]
    assert sum(kept.values()) < 1.01 * scores.numel()


def test_many_labels() -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, CLASSES, dtype=torch.float64)
    target = torch.randint(2, (5, CLASSES)).double()
    smoothed = 0.8 * target + 0.1
    expected = -(smoothed * scores.sigmoid().log() + (1 - smoothed) * (-scores).sigmoid().log())
    ours = smoothed_binary_cross_entropy(scores, target, 0.2, reduction="none")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(smoothed_binary_cross_entropy(scores, target, 0.2), expected.mean())
    prior = torch.linspace(0.1, 0.7, CLASSES, dtype=torch.float64)
    smoothed = 0.8 * target + 0.2 * prior
    torch.testing.assert_close(
        smoothed_binary_cross_entropy(scores, target, 0.2, prior=prior),
        F.binary_cross_entropy_with_logits(scores, smoothed),
    )
    padded = target.clone()
    padded[3] = -100
    kept = [0, 1, 2, 4]
    torch.testing.assert_close(
        smoothed_binary_cross_entropy(scores, padded, 0.2),
        smoothed_binary_cross_entropy(scores[kept], target[kept], 0.2),
    )
    half = smoothed_binary_cross_entropy(scores.bfloat16() * 50, target, 0.2, weight=[1.0] * CLASSES)
    assert half.dtype == torch.float32
    assert half.isfinite()


def gradient_of_a_share(lengths: list[int]) -> tuple[float, Tensor]:
    """Mean over ranks of the gradients of a shared map, each rank with its own number of valid items."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    scores, target, shared = uneven(lengths)
    rows = slice(6 * rank, 6 * rank + 6)
    loss = smoothed_cross_entropy(scores[rows] @ shared, target[rows], weight=torch.arange(1.0, 8.0), over_ranks=True)
    loss.backward()
    assert shared.grad is not None
    for values in (loss := loss.detach(), shared.grad):
        torch.distributed.all_reduce(values)
    return loss.item() / 2, shared.grad / 2


def uneven(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    scores, target = items(12, dtype=torch.float32)
    for rank, length in enumerate(lengths):
        target[6 * rank + length : 6 * rank + 6] = -100
    return scores.detach(), target, torch.eye(CLASSES, requires_grad=True)


@pytest.mark.parametrize("lengths", [[6, 1], [5, 0]])
def test_two_ranks_with_unequal_counts_equal_one_process(lengths: list[int]) -> None:
    scores, target, shared = uneven(lengths)
    whole = smoothed_cross_entropy(scores @ shared, target, weight=torch.arange(1.0, 8.0))
    whole.backward()
    for loss, gradient in run_ranks(gradient_of_a_share, 2, lengths):
        assert loss == pytest.approx(whole.item(), rel=1e-5)
        torch.testing.assert_close(gradient, shared.grad, rtol=1e-5, atol=1e-6)


def test_wrong_input_is_explained() -> None:
    scores, target = items(4, 5)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"smoothing": 1.5}, "from 0 to 1"),
        ({"scores": scores.movedim(-1, 1)}, "classes come last"),
        ({"convention": "other"}, "'all' or 'others'"),
        ({"convention": "others", "prior": [1.0] * CLASSES}, "convention='all'"),
        ({"reduction": "avg"}, "mean, sum or none"),
        ({"reduction": "sum", "over_ranks": True}, "is for the mean"),
        ({"prior": [0.5, 0.5]}, "prior has 2 numbers for 7 classes"),
        ({"weight": torch.ones(8)}, "weight has 8 numbers for 7 classes"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InputError, match=message):
            smoothed_cross_entropy(**{"scores": scores, "target": target, **arguments})
    with pytest.raises(InputError, match="weight has 2 numbers for 7 classes"):
        smoothed_binary_cross_entropy(scores, torch.zeros_like(scores), weight=[1.0, 2.0])
    options: list[tuple[dict[str, Any], str]] = [
        ({"smoothing": -0.1}, "from 0 to 1"),
        ({"prior": [0.5, -0.5]}, "from 0 up"),
        ({"weight": [0.0, 0.0]}, "not all 0"),
        ({"convention": "others", "prior": [0.5, 0.5]}, "a prior is for convention='all'"),
    ]
    for arguments, message in options:
        with pytest.raises(InputError, match=message):
            LabelSmoothing(**arguments)


def test_the_object_is_the_function() -> None:
    scores, target = items(4, 5)
    target[0] = -100
    options: dict[str, Any] = {"prior": [0.4, 0.3, 0.1, 0.1, 0.05, 0.05, 0.0], "weight": [1.0, 2, 3, 1, 1, 1, 0]}
    loss = LabelSmoothing(0.2, **options)
    assert torch.equal(loss(scores, target), smoothed_cross_entropy(scores, target, 0.2, **options))
    assert not loss.state_dict()
