"""Loss weighting from the losses alone: combinations of task losses, and their weights.  Shapes: T tasks.

A combination is a scalar to back-propagate in any loop, as in `generalised_mean(torch.stack(losses), 2.0).backward()`.
A weight function returns the gradient of its combination with respect to the losses, so that the weights can be
computed elsewhere (from losses averaged over processes, say) and `(weights * losses).sum()` be back-propagated. In
weight functions a loss of NaN stands for a task that is missing from the batch, and gets weight 0.

Source: Su Jianlin, kexue.fm/archives/8870 (initial, prior, real-time losses, generalised mean); Kendall et al., arXiv
1705.07115 (uncertainty); Liu et al., arXiv 1803.10704 (DWA); Lin et al., arXiv 2111.10603 (random); Liu et al.,
"Towards Impartial Multi-Task Learning", ICLR 2021 (IMTL).  Checked against: the formulas written plainly, and torchjd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def generalised_mean(losses: Tensor, gamma: float) -> Tensor:
    """Combine losses `(T,)` above 0 to `(mean of losses^gamma)^(1/gamma)`.

    Args:
        losses: The losses.
        gamma: 1 is the mean, 0 the geometric mean; towards infinity the worst task counts alone, towards minus
            infinity the best.
    """
    if math.isinf(gamma):
        return losses.max() if gamma > 0 else losses.min()
    logs = losses.log()
    if gamma == 0:
        return logs.mean().exp()
    return ((torch.logsumexp(gamma * logs, 0) - math.log(len(losses))) / gamma).exp()


def generalised_mean_weights(losses: Tensor, gamma: float) -> Tensor:
    """Return the weights `(T,)` of `generalised_mean`; they depend on gamma like a softmax of `gamma * log(losses)`."""
    present = ~losses.isnan()
    logs = torch.where(present, losses, 1.0).log()
    count = present.sum().to(losses.dtype)
    if math.isinf(gamma):
        farthest = torch.where(present, logs * math.copysign(1.0, gamma), -math.inf).argmax()
        return torch.zeros_like(losses).index_fill(0, farthest, 1.0) * present
    scores = torch.where(present, gamma * logs, -math.inf)
    if gamma == 0:
        log_mean = (logs * present).sum() / count
    else:
        log_mean = (torch.logsumexp(scores, 0) - count.log()) / gamma
    return torch.where(present, scores.softmax(0) * (log_mean - logs).exp(), 0.0)


def real_time(losses: Tensor) -> Tensor:
    """Divide each loss `(T,)` above 0 by its own value: the gradient is that of the sum of their logarithms."""
    return (losses / losses.detach()).sum()


def inverse_weights(losses: Tensor) -> Tensor:
    """Return `1 / losses`: the weights of `real_time`, or of initial and prior losses if those are given."""
    return losses.reciprocal().nan_to_num(nan=0.0)


def uncertainty(losses: Tensor, s: Tensor) -> Tensor:
    """Combine losses `(T,)` by learned log variances s `(T,)`: half the sum of `exp(-s) * losses + s`.

    At the optimum in s, `exp(s) = losses`: the weights are half those of `real_time`.
    """
    return (torch.exp(-s) * losses + s).sum() / 2


def imtl_l(losses: Tensor, s: Tensor) -> Tensor:
    """Combine losses `(T,)` by learned log scales s `(T,)`: sum of `exp(s) * losses - s`, twice `uncertainty(-s)`."""
    return (torch.exp(s) * losses - s).sum()


def dynamic_weight_average(last: Tensor, before_last: Tensor, temperature: float = 2.0) -> Tensor:
    """Return weights `(T,)` that sum to T and favour the tasks whose losses fall slowest.

    Args:
        last: Mean losses of the last epoch.
        before_last: Those of the epoch before.
        temperature: The larger, the more equal are the weights.
    """
    return len(last) * torch.softmax(last / before_last / temperature, 0)


def random_weights(num_tasks: int, generator: torch.Generator) -> Tensor:
    """Draw weights `(T,)` that sum to 1: a softmax of standard normal numbers."""
    return torch.softmax(torch.randn(num_tasks, generator=generator, dtype=torch.float64), 0)


def initial_cross_entropy(num_classes: int) -> float:
    """Return the cross-entropy of a head that starts with equal scores."""
    return math.log(num_classes)


def prior_cross_entropy(frequencies: Tensor) -> float:
    """Return the cross-entropy of the best constant prediction: the entropy of label frequencies or counts `(C,)`."""
    share = frequencies.double() / frequencies.sum()
    return float(-torch.special.xlogy(share, share).sum())


def initial_squared_error(targets: Tensor) -> float:
    """Return the mean squared error of a head that starts with zeros, for targets `(N,)` or `(N, D)`."""
    return float(targets.double().square().mean())


def prior_squared_error(targets: Tensor) -> float:
    """Return the mean squared error of the best constant prediction, for targets `(N,)` or `(N, D)`."""
    return float((targets.double() - targets.double().mean(0)).square().mean())
