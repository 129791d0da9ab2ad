"""Sizes and choices of a Transformer, checked once, before any network is built."""

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import InputError

Positions = Literal["rope", "learned", "sinusoidal"]
NormPlacement = Literal["pre", "post"]
Activation = Literal["gelu", "relu", "silu"]


@dataclass(frozen=True)
class TransformerConfig:
    """What an encoder is made of.

    Attributes:
        vocab_size: number of token ids.
        dim: width of the hidden states.
        num_layers: number of blocks.
        num_heads: attention heads of a block; divides `dim`.
        feedforward_dim: inner width of the position-wise network.
        dropout: rate on embeddings, attention weights and the two branches of a block.
        max_length: longest input in tokens; `positions="rope"` has no such limit and leaves it unused.
        positions: how a token learns its place: rotated queries and keys, a trained table, or fixed sinusoids.
        norm: layer normalisation before each branch (and once at the end), or after each residual sum (and once
            after the embedding).
        activation: non-linearity of the position-wise network.

    Raises:
        InputError: a value outside what is allowed; the message names the allowed ones.
    """

    vocab_size: int
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    feedforward_dim: int = 1024
    dropout: float = 0.1
    max_length: int = 512
    positions: Positions = "rope"
    norm: NormPlacement = "pre"
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "feedforward_dim", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"TransformerConfig({name}={getattr(self, name)}): use 1 or more")
        for name, choices in (("positions", Positions), ("norm", NormPlacement), ("activation", Activation)):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(get_args(choices))
                raise InputError(f"TransformerConfig({name}={getattr(self, name)!r}): use one of {allowed}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"TransformerConfig(dropout={self.dropout}): use 0 or more and less than 1")
        if self.dim % self.num_heads:
            raise InputError(
                f"TransformerConfig(dim={self.dim}, num_heads={self.num_heads}): num_heads must divide dim"
            )
        if self.positions == "rope" and self.head_size % 2:
            raise InputError(
                f"TransformerConfig(dim={self.dim}, num_heads={self.num_heads}, positions='rope'): "
                f"dim / num_heads must be even, not {self.head_size}"
            )
        if self.positions == "sinusoidal" and self.dim % 2:
            raise InputError(f"TransformerConfig(dim={self.dim}, positions='sinusoidal'): dim must be even")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads
