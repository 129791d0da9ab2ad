"""Multi-head self-attention by PyTorch's fused kernels.  Shapes: B batch, T tokens, D features, N heads.

Source: https://kexue.fm/archives/4765.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rotary import rotate


def attention_mask(mask: Tensor) -> Tensor:
    """Which keys may be seen, `(B, 1, 1, T)`, from which tokens are real, `(B, T)`.

    A row without any real token sees all of its padding: a softmax over nothing is NaN in some kernels, and the
    gradients of such a row are dropped by whatever masks the loss.
    """
    return (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]


class SelfAttention(nn.Module):
    """Self-attention with all heads in one product.

    Args:
        dim: width of the hidden states.
        num_heads: number of heads; divides `dim`.
        dropout: rate on the attention weights.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.projection = nn.Linear(dim, 3 * dim)  # queries, keys, values
        self.output = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, angles: Tensor | None = None) -> Tensor:
        """Mix the tokens of each row.

        Args:
            hidden: `(B, T, D)`.
            mask: True where a query may see a key, broadcast to `(B, N, T, T)`; None sees all.
            angles: `position_angles(T, D / N)` to rotate queries and keys by; None leaves them.

        Returns:
            `(B, T, D)`.
        """
        query, key, value = self.projection(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if angles is not None:
            query, key = rotate(torch.stack((query, key)), angles)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.output(mixed.transpose(1, 2).flatten(-2))
