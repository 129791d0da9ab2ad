"""Softmax-like loss for many labels, most of them absent.  Shapes: B batch, H heads, T tokens, P listed positives.

For every head, with positives `pos` and negatives `neg` in its cells: `log(1 + sum_pos e^-s) + log(1 + sum_neg e^s)`.
Scores are pushed to their side of 0, which is the threshold when decoding.

The usual sparse form subtracts the positives from a sum over all cells; once they dominate it, nothing is left but
rounding, and the loss keeps a floor of about (largest score - 16) or turns negative.  Here the positives are taken out
of the negatives before the sum, so the value is exact, at less memory.

Source: https://kexue.fm/archives/7359 (the loss), https://kexue.fm/archives/8888 (its sparse form),
https://kexue.fm/archives/9064 (its form for soft labels, of which smoothed ones are a case).
"""

import math

import torch
from torch import Tensor

from ...errors import InputError
from ..heads.scores import CompactScores


def multilabel_pointer_loss(scores: Tensor | CompactScores, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Loss of span scores against a list of positive cells: summed over heads, averaged over the batch.

    Heads without a positive are nearly all of them, and need no more than the sum over their cells; the few matrices
    that have one are copied out.

    Args:
        scores: `(B, H, T, T)`, in full or compact; half precision is taken to float32 first.
        labels: rows (head, i, j), `(B, P, 3)` integer; padding rows are -1 throughout. Repeated rows count once.
        smoothing: From 0 to below 0.5. Listed cells are positive to the share 1 - smoothing only, so that they stop at
            a score of `log((1 - smoothing) / smoothing) / 2`. The others, tens of thousands for each of these, stay 0:
            mass on them would outweigh the positives.

    Returns:
        Scalar, 0 or more, float32 (float64 for float64 scores).

    Raises:
        InputError: `smoothing` is out of range.
    """
    if not 0.0 <= smoothing < 0.5:
        raise InputError(f"multilabel_pointer_loss(smoothing={smoothing}): use a number from 0 to below 0.5.")
    batch, heads, length, _ = scores.shape
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    rows, chosen, cell, matrix = _listed_cells(labels, heads, length)
    if isinstance(scores, Tensor):
        everywhere, chosen_scores = scores.flatten(2).logsumexp(-1), scores[rows, chosen]
    else:
        everywhere, chosen_scores = scores.logsumexp_and_select(rows, chosen)

    chosen_scores = chosen_scores.flatten(1)
    own = chosen_scores[matrix, cell]
    left = own + math.log(smoothing) if smoothing else torch.full_like(own, torch.finfo(own.dtype).min)
    negatives = chosen_scores.index_put((matrix, cell), left).logsumexp(-1)
    positives = _log_one_plus_groups(math.log1p(-smoothing) - own, matrix, len(rows))
    is_chosen = torch.zeros_like(everywhere, dtype=torch.bool)
    is_chosen[rows, chosen] = True
    silent = _log_one_plus(everywhere).masked_fill(is_chosen, 0).sum()
    return (silent + (_log_one_plus(negatives) + positives).sum()) / batch


def dense_multilabel_pointer_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """The same loss from targets between 0 and 1, `(B, H, T, T)`, as the formula stands: the form to check against."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(2)
    targets = targets.flatten(2).to(scores.dtype)
    zero = scores.new_zeros(*scores.shape[:2], 1)
    positives = torch.cat((zero, targets.log() - scores), -1).logsumexp(-1)
    negatives = torch.cat((zero, (-targets).log1p() + scores), -1).logsumexp(-1)
    return (positives + negatives).sum(-1).mean()


def _listed_cells(labels: Tensor, heads: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The matrices that have positives, and the positives, each once.

    Returns:
        Row and head of each matrix, both `(K,)`; flat cell of each positive and the number of its matrix, both `(P,)`.
    """
    head, i, j = labels.long().unbind(-1)
    row = torch.arange(len(labels), device=labels.device)[:, None]
    cells = (((row * heads + head) * length + i) * length + j)[head >= 0].unique()
    matrices, matrix = (cells // (length * length)).unique_consecutive(return_inverse=True)
    return matrices // heads, matrices % heads, cells % (length * length), matrix


def _log_one_plus(log_sum: Tensor) -> Tensor:
    """log(1 + e^x), exact on both sides."""
    return torch.logaddexp(log_sum, torch.zeros_like(log_sum))


def _log_one_plus_groups(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """log(1 + sum of e^x over each group), `(G,)`, of values `(P,)` that carry their group's number."""
    largest = values.new_zeros(num_groups).scatter_reduce(0, groups, values.detach(), "amax")
    terms = (values - largest[groups]).exp()
    sums = torch.zeros_like(largest).scatter_add(0, groups, terms)
    # The 1 of the formula is e^(0 - largest) here; log1p keeps sums that are tiny beside it.
    return largest + torch.log1p(torch.expm1(-largest) + sums)
