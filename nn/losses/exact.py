"""EXACT: the expected accuracy of a classifier whose scores carry Gaussian noise, as a loss.

Shapes: `...` items, such as B or B, T; N items in all; C classes; Q nodes.

The class of an item is the largest of `scores + sigma * z` with z standard normal.  It is the right class y with
probability `P = E_e[prod over i != y of Phi(m_i + e)]`, where `m_i = (scores_y - scores_i) / sigma`, Phi is the normal
distribution function and e the noise of the right class: one integral, whatever C is, and nothing drawn at random.  As
sigma goes to 0, the mean of P becomes the accuracy.  The published code samples the C - 1 dimensional integral instead.

Source: Karpukhin et al., "EXACT: How to Train Your Accuracy" (arXiv 2205.09615); a critical reading:
https://kexue.fm/archives/9098.  Checked against: scipy's multivariate normal distribution and closed forms.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...errors import InputError
from .label_smoothing import smoothed_cross_entropy
from .ranks import sum_over_ranks

CHUNK = 1 << 22
"""Numbers held at a time for one chunk of nodes, N * C * nodes."""
LEAST_VARIANCE = 1e-6
"""Of the scores of a batch, when they are normalised: a batch of equal scores is not divided by 0."""
LEAST = -200.0
"""Argument of Phi below which it is 0 in float64 too; its logarithm stays a small number."""
LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)


def expected_accuracy(
    scores: Tensor, target: Tensor, sigma: float = 1.0, *, margin: float | None = None, nodes: int = 32
) -> Tensor:
    """Probability that noise of size sigma leaves the right class on top, for each item.

    Args:
        scores: `(..., C)`; half precision is taken to float32.
        target: Class numbers `(...)`.
        sigma: Standard deviation of the noise of each score, above 0.
        margin: Differences `scores_y - scores_i` count as this much at most, and pull no further beyond.
        nodes: Nodes of the integral, 2 or more. 32 err by 2e-9 at C = 10, 5e-7 at C = 100, 1e-5 at C = 1000; 64 by less
            than 1e-15, 3e-10 and 6e-8.

    Returns:
        Probabilities `(...)`, float32 (float64 for float64 scores), differentiable once, in the scores.

    Raises:
        InputError: If sigma or margin are out of range, or shapes do not fit.
    """
    if not sigma > 0:
        raise InputError(f"expected_accuracy(sigma={sigma}): use a number above 0.")
    if margin is not None and margin < 0:
        raise InputError(f"expected_accuracy(margin={margin}): use 0 or more, or None.")
    if target.shape != scores.shape[:-1]:
        raise InputError(
            f"expected_accuracy: scores {tuple(scores.shape)} and target {tuple(target.shape)}: classes come last."
        )
    flat = scores.to(torch.promote_types(scores.dtype, torch.float32)).reshape(-1, scores.shape[-1])
    differences = flat.gather(1, target.reshape(-1, 1)) - flat
    if margin is not None:
        differences = differences.clamp(max=margin)
    return _TopProbability.apply(differences / sigma, target.reshape(-1, 1), nodes).reshape(target.shape)


def normalise_scores(scores: Tensor, *, over_ranks: bool = False) -> Tensor:
    """Take the mean away and divide by the standard deviation, both over all classes and items of the batch.

    Args:
        scores: `(..., C)`; half precision is taken to float32.
        over_ranks: Count the items of all processes.

    Returns:
        Normalised scores `(..., C)`; the gradient knows that the deviation depends on them.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    reduced = sum_over_ranks if over_ranks else (lambda values: values)
    total, count = reduced(torch.stack((scores.detach().sum(), scores.new_tensor(scores.numel()))))
    count = count.clamp(min=1)
    mean = total / count  # nothing changes with it to first order
    variance = reduced((scores - mean).square().sum()) / count
    return (scores - mean) / variance.clamp(min=LEAST_VARIANCE).sqrt()


class ExactLoss(nn.Module):
    """1 - expected accuracy. Card: docs/cards/exact.md.

    Let `sigma` shrink during training, and start with `cross_entropy` at 1: `kexue.callbacks.ExactSchedule` sets both.
    With little noise, an item that is clearly right or wrong has no gradient.

    Args:
        sigma: Standard deviation of the noise, in units of the normalised scores.
        margin: An item that is right by so much, in the same units, pulls no further; None: it always does.
        nodes: Nodes of the integral, 2 or more.
        normalise: Normalise the scores over the batch, which gives sigma its meaning.
        sync_stats: Normalise and average over the batches of all processes, so that the loss is that of one process
            with the whole batch. Without it each process is on its own.
        logarithm: Return minus the logarithm of the expected accuracy instead.
        cross_entropy: Share of plain cross-entropy in the loss, 0 to 1.
        ignore_index: Class number of items that count for nothing.

    Raises:
        InputError: If sigma, margin, nodes or cross_entropy are out of range.
    """

    def __init__(
        self,
        sigma: float = 1.0,
        margin: float | None = None,
        nodes: int = 32,
        *,
        normalise: bool = True,
        sync_stats: bool = True,
        logarithm: bool = False,
        cross_entropy: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if not sigma > 0:
            raise InputError(f"ExactLoss(sigma={sigma}): use a number above 0.")
        if nodes < 2:
            raise InputError(f"ExactLoss(nodes={nodes}): use 2 or more.")
        if margin is not None and margin < 0:
            raise InputError(f"ExactLoss(margin={margin}): use 0 or more, or None.")
        if not 0 <= cross_entropy <= 1:
            raise InputError(f"ExactLoss(cross_entropy={cross_entropy}): use a number from 0 to 1.")
        self.sigma = sigma
        self.margin = margin
        self.nodes = nodes
        self.normalise = normalise
        self.sync_stats = sync_stats
        self.logarithm = logarithm
        self.cross_entropy = cross_entropy
        self.ignore_index = ignore_index

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Map scores `(..., C)` and class numbers `(...)` to the loss, a scalar; without a valid item it is 0."""
        valid = target != self.ignore_index
        scores, target = scores[valid], target[valid]
        share = self.cross_entropy
        if share == 1:
            return self._plain(scores, target)
        error = self._error(scores, target)
        return error if share == 0 else (1 - share) * error + share * self._plain(scores, target)

    def _plain(self, scores: Tensor, target: Tensor) -> Tensor:
        return smoothed_cross_entropy(scores, target, 0.0, over_ranks=self.sync_stats)

    def _error(self, scores: Tensor, target: Tensor) -> Tensor:
        if self.normalise:
            scores = normalise_scores(scores, over_ranks=self.sync_stats)
        right = expected_accuracy(scores, target, self.sigma, margin=self.margin, nodes=self.nodes)
        sums = torch.stack(((1 - right).sum(), right.new_tensor(right.numel())))
        errors, count = sum_over_ranks(sums) if self.sync_stats else sums
        error = errors / count.clamp(min=1)
        return -(1 - error).clamp(min=torch.finfo(error.dtype).tiny).log() if self.logarithm else error

    def extra_repr(self) -> str:
        """Sigma and margin."""
        return f"sigma={self.sigma}, margin={self.margin}"


class _TopProbability(torch.autograd.Function):
    """P from m `(N, C)`, with its gradient worked out on the way: nothing of the size N * C * Q is kept."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, target: Tensor, nodes: int) -> Tensor:
        points, weights = (values.to(m) for values in normal_nodes(nodes))
        probability, gradient = m.new_zeros(len(m)), torch.zeros_like(m)
        size = max(1, CHUNK // max(1, m.numel()))
        for e, w in zip(points.split(size), weights.split(size), strict=True):
            z = (m[..., None] + e).clamp(min=LEAST)
            log_phi = torch.special.log_ndtr(z).scatter_(1, target[..., None].expand(-1, -1, len(e)), 0)
            log_product = log_phi.sum(1, keepdim=True)
            probability += (w * log_product.exp()).sum((1, 2))
            # The density of one class times the product of the others.
            gradient += (w * (log_product - log_phi - 0.5 * z.square() - LOG_ROOT_TWO_PI).exp()).sum(2)
        ctx.save_for_backward(gradient.scatter_(1, target, 0))
        return probability

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * above[:, None], None, None


@lru_cache(maxsize=8)
def normal_nodes(nodes: int) -> tuple[Tensor, Tensor]:
    """Points and weights `(Q,)` of the mean over a standard normal variable, float64, on the CPU.

    Evenly spaced: for a product of many Phi, which rises like a step, that is some hundred times as exact as as many
    Gauss-Hermite nodes. Steps of 2 / sqrt(Q) make the error of the step and of the tails about the same.
    """
    points = torch.linspace(-math.sqrt(nodes), math.sqrt(nodes), nodes, dtype=torch.float64)
    weights = (-0.5 * points.square()).exp()
    return points, weights / weights.sum()
