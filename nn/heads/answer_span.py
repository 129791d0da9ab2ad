"""Where an answer begins and ends.  Shapes: R rows, T tokens, D features.

Two softmaxes over the places of a row ask for the first and for the last token; or one softmax over all pairs of places
asks for both at once. The first token of a row, [CLS], stands for "no answer here".

Source: https://kexue.fm/archives/7321 (two softmaxes), CLUE-bert4keras (pairs).  Checked against:
`BertForQuestionAnswering` of transformers.
"""

import torch
from torch import Tensor, nn

from .global_pointer import GlobalPointer


class SpanHead(nn.Module):
    """Scores of every place as first and as last token, `(R, 2, T)`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(dim, 2)

    def forward(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Score hidden states `(R, T, D)`; outside `places` `(R, T)` and [CLS] stands the dtype's minimum."""
        scores = self.projection(hidden).transpose(1, 2)
        return scores.masked_fill(~with_first(places)[:, None], torch.finfo(scores.dtype).min)


class PairHead(nn.Module):
    """Scores of every pair of a first and a last token, `(R, T, T)`."""

    def __init__(self, dim: int, head_size: int = 64) -> None:
        super().__init__()
        self.pointer = GlobalPointer(dim, 1, head_size)

    def forward(self, hidden: Tensor, places: Tensor) -> Tensor:
        """Score as `SpanHead` does; [CLS] makes a pair with itself alone."""
        scores = self.pointer(hidden, with_first(places))[:, 0]
        other = torch.arange(scores.shape[-1], device=scores.device) > 0
        return torch.cat((scores[:, :1].masked_fill(other, torch.finfo(scores.dtype).min), scores[:, 1:]), 1)


def with_first(places: Tensor) -> Tensor:
    """Places and [CLS]."""
    return torch.cat((torch.ones_like(places[:, :1]), places[:, 1:]), 1)
