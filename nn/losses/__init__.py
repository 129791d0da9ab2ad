"""Losses, all computed in float32 at least."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..heads.scores import CompactScores
from .exact import ExactLoss, expected_accuracy, normalise_scores
from .label_smoothing import LabelSmoothing, smoothed_binary_cross_entropy, smoothed_cross_entropy, smoothing_floor
from .multilabel import dense_multilabel_pointer_loss, multilabel_pointer_loss
from .power import power_binary_cross_entropy, power_sigmoid
from .ranks import sum_over_ranks

ClassificationLoss = Callable[[Tensor, Tensor], Tensor]
"""From scores `(..., C)` and class numbers `(...)` to a scalar, such as `ExactLoss()` or a `functools.partial`."""


class SpanLoss(Protocol):
    """A loss for any number of right spans, such as `LabelSmoothing()`."""

    def spans(self, scores: Tensor | CompactScores, labels: Tensor) -> Tensor:
        """From span scores `(B, H, T, T)` and rows (head, i, j) `(B, P, 3)` to a scalar."""
        ...


__all__ = [
    "ClassificationLoss",
    "ExactLoss",
    "LabelSmoothing",
    "SpanLoss",
    "dense_multilabel_pointer_loss",
    "expected_accuracy",
    "multilabel_pointer_loss",
    "normalise_scores",
    "power_binary_cross_entropy",
    "power_sigmoid",
    "smoothed_binary_cross_entropy",
    "smoothed_cross_entropy",
    "smoothing_floor",
    "sum_over_ranks",
]
