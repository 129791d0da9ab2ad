"""Positions as angles: fixed sinusoids, and the rotation of queries and keys (RoPE) built from them.

Shapes: T tokens, D features (even).  Features 2i and 2i + 1 form one plane, turned by position / base^(2i / D).

Source: https://kexue.fm/archives/4765 (sinusoids), https://kexue.fm/archives/8265 (RoPE).
"""

import torch
from torch import Tensor


def position_angles(length: int, dim: int, device: torch.device | None = None, base: float = 10000.0) -> Tensor:
    """Angle of every position in every plane, `(T, D / 2)` in float32: half precision cannot tell late positions."""
    frequencies = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    return torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)


def sinusoids(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed position vectors `(T, D)`: sines in the even features, cosines in the odd ones."""
    angles = position_angles(length, dim, device)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def rotate(vectors: Tensor, angles: Tensor) -> Tensor:
    """Turn each plane of the vectors by its angle, so that inner products depend on the distance of positions only.

    Args:
        vectors: queries or keys `(..., T, D)`.
        angles: `position_angles(T, D)`, `(T, D / 2)`.

    Returns:
        Tensor like `vectors`, same dtype; the rotation itself is done in float32 at least.
    """
    even, odd = vectors.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(vectors.dtype)
