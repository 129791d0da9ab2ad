"""Focal loss: cross-entropy of two classes in which what is right already counts little.

`-alpha y (1 - p)^gamma log p - (1 - alpha) (1 - y) p^gamma log(1 - p)`.

Source: Lin et al., "Focal Loss for Dense Object Detection" (arXiv 1708.02002), https://kexue.fm/archives/5409.
Checked against: the formula written plainly.
"""

import math

import torch
from torch import Tensor

SMALLEST = math.log(1e-8)


def focal_loss(log_p: Tensor, targets: Tensor, mask: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Mean over the places of a mask.

    Takes log-probabilities, since in float32 the largest number below 1 leaves 6e-8, not the 1e-8 that p and 1 - p are
    held to here.

    Args:
        log_p: logarithm of the probability of class 1, any shape; half precision is taken to float32 first.
        targets: 1 or 0, same shape.
        mask: places that count, same shape.
        gamma: how little what is right counts; 0: as in cross-entropy.
        alpha: weight of class 1, class 0 having 1 - alpha.
    """
    log_p = log_p.to(torch.promote_types(log_p.dtype, torch.float32)).clamp(SMALLEST, -1e-8)
    log_q = torch.log(-torch.expm1(log_p)).clamp(min=SMALLEST)
    positive = alpha * targets * (gamma * log_q).exp() * log_p
    negative = (1 - alpha) * (1 - targets) * (gamma * log_p).exp() * log_q
    return -((positive + negative) * mask).sum() / mask.sum().clamp(min=1)
