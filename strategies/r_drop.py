"""R-Drop: two passes under two sets of dropout masks, which are to agree.  Shapes: B batch, C classes.

Source: Liang et al., "R-Drop: Regularized Dropout for Neural Networks" (arXiv 2106.14448);
Su Jianlin, kexue.fm/archives/8496.  Checked against: the two Kullback-Leibler divergences written plainly, in float64
(tests/strategies/test_r_drop.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..errors import InputError
from .second_pass import SecondPass, combined, without_logging


def symmetric_kl(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of both Kullback-Leibler divergences between the distributions of two sets of logits, in float32.

    Args:
        first: Logits `(..., C)`.
        second: Logits of the same shape.
        mask: Which places count, `(...)`; None: all.

    Returns:
        Scalar, `mean of (KL(P || Q) + KL(Q || P)) / 2` over the places.
    """
    dtype = torch.promote_types(first.dtype, torch.float32)
    p, q = first.to(dtype).log_softmax(-1), second.to(dtype).log_softmax(-1)
    divergence = ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2  # both directions in one sum
    if mask is None:
        return divergence.mean()
    return (divergence * mask).sum() / mask.sum().clamp(min=1)


class RDrop(SecondPass):
    """Two passes, their mean loss, and `alpha` times the divergence of their logits. Card: docs/cards/r_drop.md.

    `training_step` must return `{"loss": ..., "logits": ...}`, and may add `"mask"`, True where logits count.

    Args:
        alpha: Weight of the divergence, 0 or more.

    Raises:
        ValueError: If alpha is below 0.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if not alpha >= 0:
            raise ValueError(f"RDrop(alpha={alpha}): use 0 or more.")
        self.alpha = alpha

    def run(self, module: pl.LightningModule, step: Callable[[], Any]) -> Any:
        first = step()
        if first is None:
            return None
        if not (isinstance(first, Mapping) and isinstance(first.get("logits"), Tensor)):
            raise InputError(
                f"RDrop(alpha={self.alpha}): training_step of {type(module).__name__} returns no logits; let it return "
                '{"loss": loss, "logits": logits}, classes last.'
            )
        with without_logging(module):
            second = step()
        divergence = symmetric_kl(first["logits"], second["logits"], first.get("mask"))
        module.log("train/r_drop", divergence.detach())
        outputs = combined(first, second, lambda a, b: (a + b) / 2)
        outputs["loss"] = outputs["loss"] + self.alpha * divergence
        if "losses" in outputs:
            outputs["losses"]["r_drop"] = self.alpha * divergence
        return outputs
