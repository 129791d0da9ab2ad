"""What stands on the hidden states.  Shapes: B batch, T tokens, D features, V ids."""

import torch
from torch import Tensor, nn

from .blocks import ACTIVATIONS
from .config import TransformerConfig
from .embeddings import Table
from .residual import Projection, make_norm


class Pooler(nn.Module):
    """A vector of the sequence, `(B, D)`: a tanh layer on the first token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.layer = Projection(config.dim, config.dim, config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden[:, 0]).tanh()


class MaskedTokenHead(nn.Module):
    """Scores of all tokens, `(..., V)`: a layer with norm back to the width of the table, the table, and a bias.

    Give it only the places that count, `(M, D)`: the product with the table is the costly part.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.layer = Projection(config.dim, config.embedding_dim, config)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = make_norm(config, config.embedding_dim)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, table: Table) -> Tensor:
        return table(self.norm(self.activation(self.layer(hidden))), tied=True) + self.bias


class TokenHead(nn.Module):
    """Scores of all tokens, `(..., V)`, by the table alone; a narrower table is met through a projection."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.layer = None
        if config.embedding_dim != config.dim:
            self.layer = Projection(config.dim, config.embedding_dim, config, bias=False)

    def forward(self, hidden: Tensor, table: Table) -> Tensor:
        return table(hidden if self.layer is None else self.layer(hidden), tied=True)
