"""What may stand between an encoder and a tagger's head.  Shapes: B batch, T tokens, D features.

Both give what the head takes, normalised, and see no padding.

Source: Lample et al., "Neural Architectures for Named Entity Recognition" (2016); Strubell et al., "Fast and Accurate
Entity Recognition with Iterated Dilated Convolutions" (2017).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from .gated_convolution import GatedStack
from .recurrent import BiLSTM


class LSTMTrunk(nn.Module):
    """Dropout, a bidirectional LSTM of the input's width, a norm.

    Args:
        dim: D, even: half of it for each direction.
        num_layers: of the LSTM.
        dropout: rate on the input.
        inner_dropout: rate between the layers.

    Raises:
        InputError: an odd width, or no layer.
    """

    def __init__(self, dim: int, num_layers: int = 2, dropout: float = 0.2, inner_dropout: float = 0.35) -> None:
        super().__init__()
        if dim % 2:
            raise InputError(f"LSTMTrunk(dim={dim}): use an even number, half of it for each direction")
        if num_layers < 1:
            raise InputError(f"LSTMTrunk(num_layers={num_layers}): use 1 or more")
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(BiLSTM(dim, dim) for _ in range(num_layers))
        self.between = nn.Dropout(inner_dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `mask` `(B, T)` is True where a token is real, the real ones first."""
        # In the precision of its weights: its state adds up over the sentence, and on CPUs autocast leaves it alone.
        hidden = self.dropout(hidden).to(self.norm.weight.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for number, layer in enumerate(self.layers):
                hidden = layer(self.between(hidden) if number else hidden, mask)
        return self.norm(hidden)


class ConvolutionTrunk(nn.Module):
    """Dropout, one stack of dilated gated convolutions applied several times over, a norm.

    Args:
        dim: D.
        dilations: of the stack.
        iterations: how often it is applied: it sees further each time, and has the parameters of one.
        dropout: rate on the input and before each application.

    Raises:
        InputError: no application.
    """

    def __init__(
        self, dim: int, dilations: Sequence[int] = (1, 1, 2), iterations: int = 4, dropout: float = 0.2
    ) -> None:
        super().__init__()
        if iterations < 1:
            raise InputError(f"ConvolutionTrunk(iterations={iterations}): use 1 or more")
        self.dropout = nn.Dropout(dropout)
        self.stack = GatedStack(dim, dilations=dilations)
        self.iterations = iterations
        self.norm = nn.LayerNorm(dim)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `mask` `(B, T)` is True where a token is real."""
        for _ in range(self.iterations):
            hidden = self.stack(self.dropout(hidden), mask)
        return self.norm(hidden)
