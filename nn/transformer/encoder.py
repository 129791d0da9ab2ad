"""Transformer encoder.  Shapes: B batch, T tokens, D features.

Source: https://kexue.fm/archives/4765.  Checked against: torch.nn.TransformerEncoderLayer (post and pre norm).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import InputError
from .attention import SelfAttention, attention_mask
from .config import TransformerConfig
from .rotary import position_angles, sinusoids

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class NarrowEmbedding(nn.Embedding):
    """Embedding table that starts narrow (deviation 0.02), so that the blocks are heard from the first step.

    Written as `reset_parameters`, which runs inside the table's own constructor: under ZeRO stage 3 a table is
    already cut into shards when the constructor of its owner goes on.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class FeedForward(nn.Module):
    """Position-wise network of two layers, `(B, T, D)` to `(B, T, D)`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.inner = nn.Linear(config.dim, config.feedforward_dim)
        self.outer = nn.Linear(config.feedforward_dim, config.dim)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.outer(self.dropout(self.activation(self.inner(hidden))))


class TransformerBlock(nn.Module):
    """Self-attention and a position-wise network, each in a residual branch: the unit that recomputation takes."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = SelfAttention(config.dim, config.num_heads, config.dropout)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.feedforward = FeedForward(config)
        self.feedforward_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, angles: Tensor | None = None) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `mask` and `angles` as in `SelfAttention.forward`."""
        if self.pre_norm:
            hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), mask, angles))
            return hidden + self.dropout(self.feedforward(self.feedforward_norm(hidden)))
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, mask, angles)))
        return self.feedforward_norm(hidden + self.dropout(self.feedforward(hidden)))


class Encoder(nn.Module):
    """Token ids to contextual vectors.

    Args:
        config: sizes and choices.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = NarrowEmbedding(config.vocab_size, config.dim)
        self.positions = NarrowEmbedding(config.max_length, config.dim) if config.positions == "learned" else None
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode a batch.

        Args:
            ids: token ids `(B, T)`.
            mask: True where a token is real, `(B, T)`; None when all are.

        Returns:
            `(B, T, D)`; values at padded places are finite and mean nothing.

        Raises:
            InputError: the input is longer than a position table made for `max_length`.
        """
        hidden = self.embed(ids)
        seen = None if mask is None else attention_mask(mask.bool())
        angles = None
        if self.config.positions == "rope":
            angles = position_angles(ids.shape[1], self.config.head_size, ids.device)
        for layer in self.layers:
            hidden = layer(hidden, mask=seen, angles=angles)
        return self.norm(hidden) if self.config.norm == "pre" else hidden

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings with whatever positions are added to them, `(B, T, D)`."""
        length, config = ids.shape[1], self.config
        if config.positions != "rope" and length > config.max_length:
            raise InputError(
                f"an input of {length} tokens is longer than TransformerConfig(max_length={config.max_length}); "
                "raise max_length, shorten the input, or use positions='rope'"
            )
        hidden = self.embedding(ids)
        if self.positions is not None:
            hidden = hidden + self.positions(torch.arange(length, device=ids.device))
        elif config.positions == "sinusoidal":
            # Scaled up as in the original Transformer, else the sinusoids drown the words.
            hidden = hidden * math.sqrt(config.dim) + sinusoids(length, config.dim, ids.device).to(hidden.dtype)
        return self.dropout(hidden if config.norm == "pre" else self.norm(hidden))
