"""Loss of the first and last token of an answer, of which there may be several.  Shapes: R rows, T tokens, P targets.

With one target it is cross-entropy. With several, either is right: `any` asks that their probabilities together be 1,
`mean` is the mean of their cross-entropies, which is what drawing one of them at each visit comes to.

Source: https://kexue.fm/archives/7321.  Checked against: `BertForQuestionAnswering` of transformers, and the formulas
written plainly.
"""

from typing import Literal

import torch
from torch import Tensor

Several = Literal["any", "mean"]


def position_loss(scores: Tensor, targets: Tensor, several: Several = "any") -> Tensor:
    """Loss of one softmax for first and one for last tokens: half of that of the pair, averaged over rows.

    A pair is right as a whole: the first token of one answer and the last of another are not.

    Args:
        scores: `(R, 2, T)`; half precision is taken to float32 first.
        targets: first and last token of each answer `(R, P, 2)`, rows filled up with -1.
        several: what counts where a row has several targets.

    Returns:
        A scalar; with one target a row, the mean of both cross-entropies.
    """
    logs = scores.to(torch.promote_types(scores.dtype, torch.float32)).log_softmax(-1)
    both = logs.gather(2, targets.clamp(min=0).transpose(1, 2)).sum(1)
    return _loss(both, targets[..., 0] * scores.shape[-1] + targets[..., 1], targets[..., 0] >= 0, several) / 2


def pair_loss(scores: Tensor, targets: Tensor, several: Several = "any") -> Tensor:
    """Loss of scores of pairs `(R, T, T)`, in one softmax over all of them; arguments as in `position_loss`."""
    logs = scores.to(torch.promote_types(scores.dtype, torch.float32)).flatten(1).log_softmax(-1)
    cells = targets[..., 0] * scores.shape[-1] + targets[..., 1]
    return _loss(logs.gather(1, cells.clamp(min=0)), cells, targets[..., 0] >= 0, several)


def _loss(logs: Tensor, cells: Tensor, listed: Tensor, several: Several) -> Tensor:
    """From log-probabilities of the targets, what tells them apart, and which there are, all `(R, P)`."""
    if several == "mean":
        return -(logs.masked_fill(~listed, 0).sum(1) / listed.sum(1)).mean()
    # A pair that is listed twice counts once, or the sum could exceed 1.
    again = (cells[:, :, None] == cells[:, None, :]).tril(-1).any(-1)
    return -logs.masked_fill(~listed | again, torch.finfo(logs.dtype).min).logsumexp(1).mean()
