"""LayerNorm whose gain and bias follow a condition.  Shapes: B batch, T tokens, D features, C features of a condition.

Source: https://kexue.fm/archives/7124.  Checked against: torch.nn.LayerNorm, and the formula written plainly.
"""

import torch
from torch import Tensor, nn


class ConditionalLayerNorm(nn.Module):
    """Normalise over the features, then scale by `gamma + W_g c` and shift by `beta + W_b c`.

    Both matrices start at 0: at first it is a plain LayerNorm, whatever the condition.

    Args:
        dim: D.
        condition_dim: C.
        eps: added to the variance.
    """

    def __init__(self, dim: int, condition_dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.to_weight = ZeroLinear(condition_dim, dim, bias=False)
        self.to_bias = ZeroLinear(condition_dim, dim, bias=False)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """Map `(B, T, D)` under conditions `(B, C)` to `(B, T, D)`."""
        normal = nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=self.eps)
        weight = self.weight + self.to_weight(condition)[:, None]
        return normal * weight + self.bias + self.to_bias(condition)[:, None]


class ZeroLinear(nn.Linear):
    """Linear layer that starts at 0 (set inside its constructor, as ZeRO 3 needs)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
