"""A small residual network for small images.  Shapes: B batch, C channels, H x W pixels, D features."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, with normalisation and activation before each (pre-activation form).

    Source: He et al., Identity Mappings in Deep Residual Networks (arXiv:1603.05027), with group in place of batch
    normalisation: a sample's result depends on nothing but the sample. So it is the same however a batch is cut into
    processes or micro-batches, and there are no running statistics on which processes could differ.

    Args:
        channels: Channels that come in, a multiple of 8.
        out_channels: Channels that go out, a multiple of 8.
        stride: 2 halves height and width.
    """

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(channels // 8, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(out_channels // 8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to `(B, C', H / stride, W / stride)`."""
        out = self.conv1(F.silu(self.norm1(x)))
        out = self.conv2(F.silu(self.norm2(out)))
        return out + self.shortcut(x)


class ResidualNetwork(nn.Module):
    """Convolution, residual blocks in two resolutions, mean over each quarter of the image.

    Quarters, not the whole: in images this small it matters where something is.

    Args:
        in_channels: Channels of the image.
        channels: Channels at full resolution, a multiple of 8; twice as many at half resolution.
        num_blocks: Blocks at each resolution.
    """

    def __init__(self, in_channels: int, channels: int, num_blocks: int) -> None:
        super().__init__()
        half_channels = 2 * channels
        self.dim = 4 * half_channels
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        full = [ResidualBlock(channels, channels) for _ in range(num_blocks)]
        half = [ResidualBlock(channels, half_channels, stride=2)]
        half += [ResidualBlock(half_channels, half_channels) for _ in range(num_blocks - 1)]
        self.blocks = nn.ModuleList(full + half)
        self.norm = nn.GroupNorm(half_channels // 8, half_channels)

    def forward(self, image: Tensor) -> Tensor:
        """Map images `(B, C, H, W)` to features `(B, D)`."""
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return F.adaptive_avg_pool2d(F.silu(self.norm(x)), 2).flatten(1)
