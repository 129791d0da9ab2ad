"""Cross-entropy with smoothed labels.  Shapes: `...` items, such as B or B, T; C classes.

With q the softmax of the scores and u the uniform distribution, `loss = -sum_k p_k log q_k` for
`p = (1 - smoothing) * target + smoothing * u`.  Its gradient in the scores is q - p, and its least value the entropy of
p, see `smoothing_floor`: losses of runs with and without smoothing do not compare, so validate with the plain loss.

No target of the size of the scores is made: of what the backward pass needs, only the log-probabilities are.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (arXiv 1512.00567), section 7; the
other convention: fairseq and OpenNMT.  Checked against: `torch.nn.functional.cross_entropy` and the formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ..heads.scores import CompactScores
from .multilabel import multilabel_pointer_loss
from .ranks import sum_over_ranks

Convention = Literal["all", "others"]
Reduction = Literal["mean", "sum", "none"]


def smoothed_cross_entropy(
    scores: Tensor,
    target: Tensor,
    smoothing: float = 0.1,
    *,
    convention: Convention = "all",
    prior: Tensor | Sequence[float] | None = None,
    weight: Tensor | Sequence[float] | None = None,
    class_mask: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    over_ranks: bool = False,
) -> Tensor:
    """Cross-entropy against targets that keep `1 - smoothing` of their mass and spread the rest over the classes.

    Args:
        scores: `(..., C)`, unnormalised; half precision is taken to float32.
        target: Class numbers `(...)`, or distributions `(..., C)` (mixup, say), which are smoothed like the rest.
        smoothing: Mass that is spread, 0 to 1.
        convention: "all": `smoothing / C` for every class, the true one too, as torch has it. "others":
            `smoothing / (C - 1)` for the others, the true one keeps `1 - smoothing`, as fairseq has it.
        prior: Probabilities `(C,)` of the classes that the mass is spread by instead of evenly.
        weight: Weight `(C,)` of each class, as in torch.
        class_mask: True for the classes that an item may have, broadcastable to `(..., C)`: the others get no mass and
            no probability. Scores of minus infinity without it make the loss infinite.
        ignore_index: Class number of items that count for nothing.
        reduction: "mean" over what is not ignored (weighted by the items' class weights, as in torch; 0 where
            all is ignored), "sum", or "none": a loss for each item, 0 where ignored.
        over_ranks: Take the mean over the items of all processes. They may hold different numbers of items: the mean
            of the processes' gradients is then the gradient of the mean over all items.

    Returns:
        Scalar, or `(...)` with reduction "none"; float32 (float64 for float64 scores).

    Raises:
        InputError: If shapes do not fit, `smoothing` is out of range, or arguments exclude each other.
    """
    call = f"smoothed_cross_entropy(smoothing={smoothing}, convention={convention!r})"
    soft = target.is_floating_point()
    if not 0.0 <= smoothing <= 1.0:
        raise InputError(f"{call}: use a smoothing from 0 to 1.")
    if target.shape != (scores.shape if soft else scores.shape[:-1]):
        raise InputError(f"{call}: scores {tuple(scores.shape)} and target {tuple(target.shape)}: classes come last.")
    if convention not in ("all", "others"):
        raise InputError(f"{call}: use convention='all' or 'others'.")
    if convention == "others" and (soft or prior is not None):
        raise InputError(f"{call}: 'others' is for class numbers and an even spread; use convention='all'.")
    _check_length(call, scores.shape[-1], prior=prior, weight=weight)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weight, prior = (_vector(values, scores, dtype) for values in (weight, prior))

    log_q = _log_probabilities(scores, class_mask, dtype)
    if soft:
        mass = scores.new_ones(target.shape[:-1], dtype=dtype)
        valid = mass.bool()
        plain = (log_q * (target if weight is None else target * weight)).sum(-1)
    else:
        valid = target != ignore_index
        index = target.masked_fill(~valid, 0)
        own = 1 if weight is None else weight[index]
        mass = valid.to(dtype) * own
        plain = log_q.gather(-1, index[..., None]).squeeze(-1) * own
    share: float | Tensor = smoothing
    if convention == "others":
        # The same loss as "all" with more smoothing, C / (C - 1) times as much.
        count = torch.tensor(scores.shape[-1]) if class_mask is None else class_mask.sum(-1)
        share = smoothing * (1 + 1 / (count - 1).clamp(min=1).to(dtype))
    losses = (share - 1) * plain - share * _mean_over_classes(log_q, prior, weight, class_mask)
    return _reduce(call, losses.masked_fill(~valid, 0), mass, reduction, over_ranks)


def smoothed_binary_cross_entropy(
    scores: Tensor,
    target: Tensor,
    smoothing: float = 0.1,
    *,
    prior: Tensor | Sequence[float] | None = None,
    weight: Tensor | Sequence[float] | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    over_ranks: bool = False,
) -> Tensor:
    """The form for many labels: each of C yes/no decisions against `(1 - smoothing) * target + smoothing / 2`.

    Args:
        scores: `(..., C)`, logits; half precision is taken to float32.
        target: 0, 1 or between, `(..., C)`.
        smoothing: Mass that is spread, 0 to 1.
        prior: Share of yes of each class `(C,)`, in place of one half.
        weight: Weight `(C,)` of each class, in sum and mean.
        ignore_index: Target of decisions that count for nothing.
        reduction: "mean" over the decisions that count, "sum" or "none".
        over_ranks: Take the mean over all processes.

    Returns:
        Scalar, or `(..., C)` with reduction "none"; float32 (float64 for float64 scores).

    Raises:
        InputError: If shapes do not fit, or `smoothing` is out of range.
    """
    call = f"smoothed_binary_cross_entropy(smoothing={smoothing})"
    if not 0.0 <= smoothing <= 1.0:
        raise InputError(f"{call}: use a smoothing from 0 to 1.")
    if target.shape != scores.shape:
        raise InputError(f"{call}: scores {tuple(scores.shape)} and target {tuple(target.shape)} must be the same.")
    _check_length(call, scores.shape[-1], prior=prior, weight=weight)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weight, prior = (_vector(values, scores, dtype) for values in (weight, prior))
    valid = target != ignore_index
    smoothed = (1 - smoothing) * target.to(dtype).masked_fill(~valid, 0) + smoothing * (0.5 if prior is None else prior)
    losses = F.binary_cross_entropy_with_logits(scores.to(dtype), smoothed, weight, reduction="none")
    return _reduce(call, losses.masked_fill(~valid, 0), valid.to(dtype), reduction, over_ranks)


class LabelSmoothing(nn.Module):
    """Smoothed labels for one class an item, or for any number of spans. Card: docs/cards/label_smoothing.md.

    Args:
        smoothing: Mass that is spread, 0 to 1.
        convention: See `smoothed_cross_entropy`.
        prior: Probability of each class that the mass is spread by instead of evenly.
        weight: Weight of each class.
        ignore_index: Class number of items that count for nothing.
        over_ranks: Take the mean over the items of all processes.

    Raises:
        InputError: If `smoothing` or a number of `prior` or `weight` is out of range, or arguments exclude each other.
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        *,
        convention: Convention = "all",
        prior: list[float] | None = None,
        weight: list[float] | None = None,
        ignore_index: int = -100,
        over_ranks: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= smoothing <= 1.0:
            raise InputError(f"LabelSmoothing(smoothing={smoothing}): use a number from 0 to 1.")
        if convention == "others" and prior is not None:
            raise InputError("LabelSmoothing(convention='others', prior=...): a prior is for convention='all'.")
        for name, values in (("prior", prior), ("weight", weight)):
            if values is not None and not (min(values) >= 0 and sum(values) > 0):
                raise InputError(f"LabelSmoothing({name}={values}): use numbers from 0 up, not all 0.")
        self.smoothing = smoothing
        self.convention: Convention = convention
        self.prior = prior
        self.weight = weight
        self.ignore_index = ignore_index
        self.over_ranks = over_ranks

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Map scores `(..., C)` and class numbers `(...)` to the loss, see `smoothed_cross_entropy`."""
        return smoothed_cross_entropy(
            scores,
            target,
            self.smoothing,
            convention=self.convention,
            prior=self.prior,
            weight=self.weight,
            ignore_index=self.ignore_index,
            over_ranks=self.over_ranks,
        )

    def spans(self, scores: Tensor | CompactScores, labels: Tensor) -> Tensor:
        """Map span scores `(B, H, T, T)` and listed spans `(B, P, 3)` to the loss, see `multilabel_pointer_loss`."""
        if self.prior is not None or self.weight is not None or self.convention != "all" or self.over_ranks:
            raise InputError(
                f"LabelSmoothing({self.extra_repr()}): spans take smoothing alone; leave convention, prior, weight and "
                "over_ranks out."
            )
        return multilabel_pointer_loss(scores, labels, self.smoothing)

    def extra_repr(self) -> str:
        """What was given."""
        return f"smoothing={self.smoothing}, convention={self.convention!r}, prior={self.prior}, weight={self.weight}"


def smoothing_floor(num_classes: int, smoothing: float = 0.1, convention: Convention = "all") -> float:
    """Return the least value of the loss, the entropy of a smoothed target.

    Subtract it where the size of a loss becomes its weight. The scores that reach it lie
    `log(1 + C * (1 - smoothing) / smoothing)` apart (convention "all").
    """
    other = smoothing / (num_classes if convention == "all" else num_classes - 1)
    true = 1 - (num_classes - 1) * other
    return -sum(count * p * math.log(p) for count, p in ((1, true), (num_classes - 1, other)) if p > 0)


def _check_length(call: str, classes: int, **vectors: Tensor | Sequence[float] | None) -> None:
    for name, values in vectors.items():
        if values is not None and len(values) != classes:
            raise InputError(f"{call}: {name} has {len(values)} numbers for {classes} classes; give one for each.")


def _vector(values: Tensor | Sequence[float] | None, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else torch.as_tensor(values, dtype=dtype, device=like.device)


def _log_probabilities(scores: Tensor, class_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """log q, `(..., C)`; 0 for the classes that an item may not have."""
    if class_mask is None:
        return scores.log_softmax(-1, dtype=dtype)
    scores = scores.to(dtype).masked_fill(~class_mask, torch.finfo(dtype).min)
    return scores.log_softmax(-1).masked_fill(~class_mask, 0)


def _mean_over_classes(log_q: Tensor, prior: Tensor | None, weight: Tensor | None, class_mask: Tensor | None) -> Tensor:
    """Mean over the allowed classes by the prior, times the classes' weights, `(...)`."""
    if prior is None and weight is None and class_mask is None:
        return log_q.mean(-1)
    prior = log_q.new_ones(log_q.shape[-1]) if prior is None else prior
    total = prior.sum() if class_mask is None else (prior * class_mask).sum(-1)
    return (log_q * (prior if weight is None else prior * weight)).sum(-1) / total


def _reduce(call: str, losses: Tensor, mass: Tensor, reduction: Reduction, over_ranks: bool) -> Tensor:
    if reduction not in ("mean", "sum", "none") or (over_ranks and reduction != "mean"):
        raise InputError(f"{call}: reduction={reduction!r}, use mean, sum or none; over_ranks=True is for the mean.")
    if reduction != "mean":
        return losses.sum() if reduction == "sum" else losses
    count = mass.sum()
    if over_ranks:
        # Each process keeps its own sum, as much larger as the mean over processes will make it smaller.
        count, processes = sum_over_ranks(torch.stack((count, torch.ones_like(count))))
        count = count / processes
    return losses.sum() / torch.where(count == 0, 1, count)
