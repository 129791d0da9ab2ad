"""Recurrent layers for padded batches.  Shapes: B rows, T places, D features."""

import torch
from torch import Tensor, nn

from ..errors import InputError


class BiLSTM(nn.Module):
    """One LSTM along each row and one from its last valid place back: padding changes nothing, as in packed sequences.

    Two LSTMs of one direction read padded rows, the second one with the valid part turned round; that is quicker than
    packing and works under autocast. The outputs are 0 on padding.

    Args:
        input_dim: features of a place.
        dim: features of the output, half of them from each direction; even.
    """

    def __init__(self, input_dim: int, dim: int) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise InputError(f"BiLSTM(dim={dim}): use an even number, 2 or more")
        self.ahead = nn.LSTM(input_dim, dim // 2, batch_first=True)
        self.back = nn.LSTM(input_dim, dim // 2, batch_first=True)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Outputs `(B, T, dim)` for inputs `(B, T, D)`, valid from the left as `mask` `(B, T)` says."""
        order = turned_round(mask)
        ahead, back = self.ahead(inputs)[0], self.back(_take(inputs, order))[0]
        return torch.cat([ahead, _take(back, order)], -1) * mask[..., None].to(ahead.dtype)


def turned_round(mask: Tensor) -> Tensor:
    """Places `(B, T)` of each row with its valid part from behind; padding stays where it is. Its own inverse."""
    place = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, mask.sum(-1, keepdim=True) - 1 - place, place)


def _take(values: Tensor, order: Tensor) -> Tensor:
    return values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))
