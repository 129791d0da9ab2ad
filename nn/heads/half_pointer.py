"""Where spans start and where they end, as two independent scores a place.  Shapes: B rows, T places, D features."""

import torch
from torch import Tensor, nn


class HalfPointer(nn.Module):
    """A convolution over three places, then a score for a start and one for an end.

    Args:
        dim: features of a place.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Conv1d(dim, dim, 3, padding=1)
        self.outer = nn.Linear(dim, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores `(B, T, 2)`, whose sigmoids are probabilities, of hidden states `(B, T, D)` that are 0 on padding."""
        return self.outer(torch.relu(self.inner(hidden.transpose(1, 2))).transpose(1, 2))


def bordered_loss(scores: Tensor, labels: Tensor, borders: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of starts and of ends where only some places can be one: the mean over the valid places.

    Elsewhere the probability is exactly 0: such a place costs nothing, also if it is labelled. That label, of a span
    that cannot be found whatever the scores are, would cost infinity.

    Args:
        scores: `(B, T, 2)`, see `HalfPointer`; half precision is taken to float32.
        labels: true where a start, an end is, `(B, T, 2)`.
        borders: true where one may be, `(B, T, 2)`.
        mask: true on valid places, `(B, T)`.

    Returns:
        The losses of starts and of ends.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    losses = nn.functional.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
    counted = (borders & mask[..., None]).to(scores.dtype)
    start, end = ((losses * counted).sum((0, 1)) / mask.sum()).unbind()
    return start, end
