"""Spans by the class of their first and of their last token.  Shapes: B batch, T tokens, D features, K types.

The last token is asked for given the first one's class at the same token: in training the right one, else the one found
("hard") or its probabilities ("soft").

Source: the 9th-place system of the Daguan cup 2019.  Checked against: spans written by hand.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from ..decoding.half_pointers import pair_nearest

StartLabel = Literal["hard", "soft"]


class StartEndHead(nn.Module):
    """Two classifiers of tokens; class 0 is "no span begins (ends) here", 1 + k a span of type k.

    Args:
        dim: D.
        num_types: K.
        start_label: what the second classifier is told: "hard", the number of the class, or "soft", K + 1
            probabilities.

    Raises:
        InputError: another `start_label`.
    """

    def __init__(self, dim: int, num_types: int, start_label: StartLabel = "soft") -> None:
        super().__init__()
        if start_label not in get_args(StartLabel):
            raise InputError(f"StartEndHead(start_label={start_label!r}): use one of {', '.join(get_args(StartLabel))}")
        self.num_classes = num_types + 1
        self.start_label: StartLabel = start_label
        width = dim + (1 if start_label == "hard" else self.num_classes)
        self.start = nn.Linear(dim, self.num_classes)
        self.inner = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.end = nn.Linear(width, self.num_classes)

    def forward(self, features: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores of the classes of first and of last tokens.

        Args:
            features: `(B, T, D)`.
            starts: the right classes of first tokens `(B, T)`; None: go by those found.

        Returns:
            `(B, T, K + 1)` each.
        """
        first = self.start(features)
        if self.start_label == "hard":
            told = (first.argmax(-1) if starts is None else starts)[..., None]
        else:
            told = first.softmax(-1) if starts is None else F.one_hot(starts, self.num_classes)
        inner = self.inner(torch.cat((features, told.to(features.dtype)), -1)).tanh()
        return first, self.end(self.norm(inner))


def start_end_classes(spans: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Classes of first and of last tokens `(B, T)` of spans (type, first, last) `(B, P, 3)`, -1 where there is none."""
    found = spans.new_zeros(2, len(spans), length)
    row, place = (spans[..., 0] >= 0).nonzero(as_tuple=True)
    kind, first, last = spans[row, place].unbind(-1)
    found[0, row, first] = kind + 1
    found[1, row, last] = kind + 1
    return found[0], found[1]


def start_end_loss(starts: Tensor, ends: Tensor, right: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Mean over sentences of the mean over their tokens of both cross-entropies, in float32.

    Args:
        starts, ends: scores `(B, T, K + 1)`.
        right: classes of first and of last tokens `(B, T)`.
        mask: True where a token counts `(B, T)`.
    """
    losses = [
        F.cross_entropy(scores.float().transpose(1, 2), classes, reduction="none")
        for scores, classes in zip((starts, ends), right, strict=True)
    ]
    return (((losses[0] + losses[1]) * mask).sum(-1) / mask.sum(-1)).mean()


@torch.no_grad()
def decode_start_end(starts: Tensor, ends: Tensor, mask: Tensor) -> list[list[tuple[int, int, int]]]:
    """Spans (type, first, last) of each sentence: from each first token to the nearest last one of its class.

    One last token may serve several first ones. A first token with none after it gives no span.

    Args:
        starts, ends: classes `(B, T)`.
        mask: True where a token may be part of a span `(B, T)`.
    """
    num_types = max(int(starts.max()), int(ends.max()), 1)
    kinds = torch.arange(1, num_types + 1, device=starts.device)
    begins, stops = ((classes[..., None] == kinds) & mask[..., None] for classes in (starts, ends))
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(len(starts))]
    for row, kind, first, last in pair_nearest(begins, stops).tolist():
        found[row].append((kind, first, last))
    return found
