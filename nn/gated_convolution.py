"""Dilated gated convolutions, and a vector of a sequence by attention.  Shapes: B batch, T tokens, D features.

A block mixes its input with a convolution of it, `x (1 - s) + h s`: as long as a gate is near 0, information passes by.

Source: https://kexue.fm/archives/5409, https://kexue.fm/archives/6906.  Checked against: the formulas written plainly.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError

GateNoise = Literal["dropout", "uniform"]


class GatedBlock(nn.Module):
    """One gated convolution.

    Args:
        width: of the input.
        outputs: width of the output; None takes that of the input.
        kernel: tokens that it sees at once, an odd number.
        dilation: distance between them.
        project: whether an input of another width passes by through a linear layer; else it does not pass by.
        noise: in training, "dropout" sets some logits of the gate to 0, so that it is half open; "uniform" stretches
            every logit by a factor from 1 - rate to 1 + rate.
        rate: of the noise.

    Raises:
        InputError: a value out of range.
    """

    def __init__(
        self,
        width: int,
        outputs: int | None = None,
        *,
        kernel: int = 3,
        dilation: int = 1,
        project: bool = True,
        noise: GateNoise = "dropout",
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0 or kernel < 1 or dilation < 1:
            raise InputError(
                f"GatedBlock(kernel={kernel}, dilation={dilation}): use an odd kernel, a dilation of 1 or more"
            )
        if noise not in get_args(GateNoise) or not 0 <= rate < 1:
            known = ", ".join(get_args(GateNoise))
            raise InputError(
                f"GatedBlock(noise={noise!r}, rate={rate}): use one of {known}, and a rate from 0 to below 1"
            )
        outputs = outputs or width
        self.noise: GateNoise = noise
        self.rate = rate
        self.convolution = nn.Conv1d(width, 2 * outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation)
        self.passes_by = width == outputs or project
        self.projection = nn.Linear(width, outputs, bias=False) if width != outputs and project else None

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, outputs)`, 0 outside `mask` `(B, T)`."""
        inputs = inputs * mask[..., None]
        found, logits = self.convolution(inputs.transpose(1, 2)).transpose(1, 2).chunk(2, -1)
        gate = self._noisy(logits).sigmoid()
        outputs = found * gate
        if self.passes_by:
            outputs = outputs + (inputs if self.projection is None else self.projection(inputs)) * (1 - gate)
        return outputs * mask[..., None]

    def _noisy(self, logits: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return logits
        if self.noise == "dropout":
            return F.dropout(logits, self.rate)
        return logits * (1 + self.rate * (2 * torch.rand_like(logits) - 1))


class GatedStack(nn.Module):
    """Gated convolutions one after another.

    Args:
        width: of the input.
        outputs: width of all outputs; None takes that of the input.
        dilations: of each block.
        project, noise, rate: see `GatedBlock`.
    """

    def __init__(
        self,
        width: int,
        outputs: int | None = None,
        *,
        dilations: Sequence[int],
        project: bool = True,
        noise: GateNoise = "dropout",
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        outputs = outputs or width
        widths = [width, *[outputs] * (len(dilations) - 1)]
        self.blocks = nn.ModuleList(
            GatedBlock(inner, outputs, dilation=dilation, project=project, noise=noise, rate=rate)
            for inner, dilation in zip(widths, dilations, strict=True)
        )

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, outputs)`, 0 outside `mask` `(B, T)`."""
        for block in self.blocks:
            inputs = block(inputs, mask)
        return inputs


class AttentionPooling(nn.Module):
    """A vector of a sequence: the mean of its tokens, weighted by `softmax(a . tanh(W x))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, D)`; tokens outside `mask` `(B, T)` have no weight, and an empty sequence is 0."""
        scores = self.score(self.layer(inputs).tanh())[..., 0]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1) * mask
        return (weights[:, None] @ inputs)[:, 0]
