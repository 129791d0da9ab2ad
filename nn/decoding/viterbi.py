"""The best path through a chain of tags.  Shapes: B batch, T tokens, L tags.

Of every step only the best score of each tag is kept; which tag it came from is found again along the one path that
is asked for, L comparisons a token in place of L^2 remembered places.

Source: https://kexue.fm/archives/5542.  Checked against: all paths enumerated, pytorch-crf.
"""

import torch
from torch import Tensor

CELLS_AT_ONCE = 1 << 17
"""Sums of (score, transition) made together on a CPU: they stay in its cache."""


@torch.no_grad()
def best_paths(
    emissions: Tensor, lengths: Tensor, transitions: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Path of the highest score for each sentence; of equal ones, that with the smaller tag numbers at the end.

    Args:
        emissions: score of each tag at each token `(B, T, L)`; half precision is taken to float32 first.
        lengths: tokens of each sentence, 1 or more, `(B,)`.
        transitions: score of tag j after tag i `(L, L)`.
        start: score of each tag at the first token `(L,)`.
        end: score of each tag at the last token `(L,)`.

    Returns:
        Tags `(B, T)`, 0 after a sentence's end; scores of the paths `(B,)`.
    """
    dtype = torch.promote_types(emissions.dtype, torch.float32)
    emissions, transitions, start, end = (part.to(dtype) for part in (emissions, transitions, start, end))
    batch, length, num_tags = emissions.shape
    rows = batch
    if emissions.device.type == "cpu":
        rows = max(1, CELLS_AT_ONCE // (num_tags * num_tags))
    best = emissions.new_empty(length, batch, num_tags)
    into = transitions.t().contiguous()
    for first in range(0, batch, rows):
        part = slice(first, first + rows)
        _fill(best[:, part], emissions[part].transpose(0, 1).contiguous(), into, start)
    last = lengths.to(emissions.device) - 1
    row = torch.arange(batch, device=emissions.device)
    scores, tag = (best[last, row] + end).max(-1)
    tags = torch.zeros(length, batch, dtype=torch.long, device=emissions.device)
    tags[length - 1] = tag
    inside = torch.arange(length, device=emissions.device)[:, None] <= last
    for place in range(length - 1, 0, -1):
        before = (best[place - 1] + into.index_select(0, tag)).argmax(-1)
        tag = torch.where(inside[place], before, tag)
        tags[place - 1] = tag
    return tags.masked_fill_(~inside, 0).t(), scores


def _fill(best: Tensor, emissions: Tensor, into: Tensor, start: Tensor) -> None:
    """Best score of a path to each tag at each token, `(T, B, L)`."""
    sums = emissions.new_empty(emissions.shape[1], *into.shape)
    torch.add(emissions[0], start, out=best[0])
    for place in range(1, len(emissions)):
        torch.add(best[place - 1].unsqueeze(1), into, out=sums)
        torch.add(sums.amax(-1), emissions[place], out=best[place])
