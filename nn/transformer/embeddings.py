"""Token ids to vectors, and vectors to scores of tokens by the same table.

Shapes: B batch, T tokens, D features, V ids.
"""

import math

import torch
from torch import Tensor, nn

from ...errors import InputError
from .config import TransformerConfig
from .positions import sinusoids
from .products import linear
from .residual import Projection, make_norm


class Table(nn.Embedding):
    """Embedding table that starts narrow, so that the blocks are heard from the first step.

    Written as `reset_parameters`, which runs inside the table's own constructor: under ZeRO stage 3 a table is
    already cut into shards when the constructor of its owner goes on.
    """

    def __init__(self, rows: int, width: int, std: float = 0.02) -> None:
        self.std = std
        super().__init__(rows, width)

    def reset_parameters(self) -> None:
        """Draw new vectors."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, input: Tensor, tied: bool = False) -> Tensor:
        """Rows of ids `(...)` as `(..., D)`; `tied`: products of vectors `(..., D)` with all rows, `(..., V)`.

        Both ways go through this method, whose hooks bring the whole table together under ZeRO stage 3.
        """
        return linear(input, self.weight) if tied else super().forward(input)


class Embedding(nn.Module):
    """Vectors of tokens with what stands for their positions and segments.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width, std = config.embedding_dim, config.init_std
        self.tokens = Table(config.vocab_size, width, std)
        self.positions = None
        if config.positions == "learned":
            rows = config.max_length + config.first_position
            self.positions = Table(rows, width, std)
        self.segments = Table(config.num_segments, width, std) if config.num_segments else None
        self.norm = make_norm(config, width) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.dropout)
        self.projection = Projection(width, config.dim, config) if width != config.dim else None

    def forward(self, ids: Tensor, places: Tensor, segments: Tensor | None = None) -> Tensor:
        """Embed a batch.

        Args:
            ids: token ids `(B, T)`.
            places: the position of each, `(T,)` or `(B, T)`.
            segments: segment numbers `(B, T)`; None: all 0.

        Returns:
            `(B, T, D)`.
        """
        config = self.config
        hidden = self.tokens(ids)
        if config.positions == "sinusoidal":
            # Scaled up as in the original Transformer, else the sinusoids drown the words.
            hidden = hidden * math.sqrt(hidden.shape[-1]) + sinusoids(places, hidden.shape[-1]).to(hidden.dtype)
        if self.segments is not None:
            hidden = hidden + self.segments(ids.new_zeros(1) if segments is None else segments)
        if self.positions is not None:
            hidden = hidden + self.positions(places)
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = self.dropout(hidden)
        return hidden if self.projection is None else self.projection(hidden)


def places_of(config: TransformerConfig, length: int, past: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """The positions of the last T tokens, `(T,)`, or `(B, T)` where padding is not counted.

    Args:
        config: which numbering.
        length: T.
        past: tokens of earlier passes.
        mask: True where a token is real, `(B, past + T)`.
        device: where to make them.

    Raises:
        InputError: the input is longer than what was made for `max_length`.
    """
    if config.positions in ("learned", "sinusoidal") and past + length > config.max_length:
        raise InputError(
            f"an input of {past + length} tokens is longer than TransformerConfig(max_length={config.max_length}); "
            "raise max_length, shorten the input, or use positions='rope'"
        )
    if config.first_position and mask is not None:
        real = mask.long()
        return (real.cumsum(-1) * real)[:, past:] + config.first_position - 1
    return torch.arange(past, past + length, device=device) + config.first_position
