"""Positions: fixed sinusoids, the rotation of queries and keys (RoPE), and Transformer-XL's relative scores.

Shapes: B batch, N heads, T queries, S keys, D features (even).  Under rotation, features 2i and 2i + 1 form one plane,
turned by position / base^(2i / D).

Source: https://kexue.fm/archives/4765 (sinusoids), https://kexue.fm/archives/8265 (RoPE), Z. Dai et al.
"Transformer-XL" (arXiv 1901.02860).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def position_angles(
    positions: int | Tensor, dim: int, device: torch.device | None = None, base: float = 10000.0
) -> Tensor:
    """Angle of every position in every plane.

    Args:
        positions: any tensor of positions `(...)`, or a number T that stands for 0 to T - 1.
        dim: number of features, D.
        device: where to make the angles of a number of positions.
        base: longest wave length over 2 pi.

    Returns:
        `(..., D / 2)` in float64 where the device has it: float32 is off by 1e-4 at position 2000.
    """
    if isinstance(positions, int):
        positions = torch.arange(positions, device=device)
    precision = torch.float32 if positions.device.type == "mps" else torch.float64
    planes = torch.arange(0, dim, 2, device=positions.device, dtype=precision)
    return positions.to(precision)[..., None] * base ** (-planes / dim)


def sinusoids(positions: int | Tensor, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed position vectors `(..., D)` in float32: sines in the even features, cosines in the odd ones."""
    angles = position_angles(positions, dim, device)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).float()


def rotate(vectors: Tensor, angles: Tensor) -> Tensor:
    """Turn each plane of the vectors by its angle, so that inner products depend on the distance of positions only.

    Args:
        vectors: queries or keys `(..., T, D)`.
        angles: `position_angles(T, D)`, `(T, D / 2)`, or one such table for each row, broadcast to the vectors.

    Returns:
        Tensor like `vectors`, same dtype; the rotation itself is done in float32 at least.
    """
    even, odd = vectors.unflatten(-1, (-1, 2)).unbind(-1)
    precision = torch.promote_types(vectors.dtype, torch.float32)
    cos, sin = angles.cos().to(precision), angles.sin().to(precision)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return rotated.flatten(-2).to(vectors.dtype)


def distance_vectors(
    num_queries: int, num_keys: int, dim: int, *, both_ways: bool, clamp: int = 0, device: torch.device | None = None
) -> Tensor:
    """Sinusoids of all distances from queries to keys, the farthest first, `(P, D)`: first all sines, then all cosines.

    The queries are the last T of the S keys. Distances run from S - 1 to 0, or, with keys after the query, to 1 - T.

    Args:
        num_queries: T.
        num_keys: S, memory included.
        dim: width of a vector, D.
        both_ways: whether queries see keys after themselves.
        clamp: distances beyond count as this; 0 for no limit.
        device: where to make them.
    """
    distances = torch.arange(num_keys - 1, -num_queries if both_ways else -1, -1, device=device)
    if clamp:
        distances = distances.clamp(-clamp, clamp)
    angles = position_angles(distances, dim)
    return torch.cat((angles.sin(), angles.cos()), dim=-1).float()


def relative_shift(scores: Tensor, num_keys: int) -> Tensor:
    """Turn scores by distance `(..., T, P)`, distances as in `distance_vectors`, into scores by key `(..., T, S)`.

    Entry (i, j) becomes the score of query i at the distance of key j, column T - 1 - i + j: one row further is one
    column less, which a view of other width gives without a gather. Where distances end at 0, keys after the query get
    values without meaning, for the causal mask to hide.
    """
    rows, columns = scores.shape[-2:]
    flat = F.pad(scores, (0, 1)).flatten(-2)
    return flat[..., rows - 1 : rows - 1 + rows * columns].unflatten(-1, (rows, columns))[..., :num_keys]
