"""Do two texts belong together? By attention of each to the other.  Shapes: P pairs, Q and K places, D features."""

import torch
from torch import Tensor, nn

from ...errors import InputError


class CrossAttention(nn.Module):
    """Attention of one sequence to another, without biases or projection of the output.

    Args:
        dim: features; the heads divide them.
        num_heads: number of heads.
    """

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise InputError(f"CrossAttention(dim={dim}, num_heads={num_heads}): num_heads must divide dim")
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, queries: Tensor, keys: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
        """What each of the queries `(P, Q, D)` sees of the keys `(P, K, D)`; 0 where the query is padding."""
        query, key, value = (
            layer(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, queries), (self.key, keys), (self.value, keys))
        )
        seen = nn.functional.scaled_dot_product_attention(query, key, value, key_mask[:, None, None, :])
        return seen.transpose(1, 2).flatten(2) * query_mask[..., None].to(seen.dtype)


class CrossMatch(nn.Module):
    """One score a pair: both sequences attend to each other, what they see is pooled, and a small network judges it.

    Args:
        dim: features of both sequences, and of the third vector.
        num_heads: heads of the attention.
        dropout: rate before the network.
    """

    def __init__(self, dim: int, num_heads: int = 8, dropout: float = 0.2) -> None:
        super().__init__()
        self.left, self.right = CrossAttention(dim, num_heads), CrossAttention(dim, num_heads)
        self.judge = nn.Sequential(nn.Dropout(dropout), nn.Linear(3 * dim, dim), nn.ReLU(), nn.Linear(dim, 1))

    def forward(self, one: Tensor, other: Tensor, one_mask: Tensor, other_mask: Tensor, more: Tensor) -> Tensor:
        """Scores `(P,)` of sequences `(P, Q, D)` and `(P, K, D)` and a further vector `(P, D)` of each pair."""
        left = largest(self.left(one, other, one_mask, other_mask), one_mask)
        right = largest(self.right(other, one, other_mask, one_mask), other_mask)
        return self.judge(torch.cat([left, right, more], -1))[:, 0]


def largest(states: Tensor, mask: Tensor) -> Tensor:
    """The largest value of each feature over the valid places of `(P, Q, D)`."""
    return states.masked_fill(~mask[..., None], torch.finfo(states.dtype).min).amax(1)
