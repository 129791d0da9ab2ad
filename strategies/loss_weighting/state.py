"""What loss weighting keeps between steps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .rules import MAX_TASKS, Rule


class LossWeights(nn.Module):
    """What loss weighting remembers: running means, last weights, and the buffers of the rule."""

    weights: Tensor
    mean: Tensor
    mean_count: Tensor
    gram: Tensor
    gram_count: Tensor

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.window: dict[str, Tensor] = {}
        self.register_buffer("weights", torch.ones(MAX_TASKS))
        for name, shape in (("mean", (MAX_TASKS,)), ("gram", (MAX_TASKS, MAX_TASKS))):
            self.register_buffer(name, torch.zeros(shape))
            self.register_buffer(f"{name}_count", torch.zeros(shape))

    def open_window(self) -> None:
        """Keep what the buffers hold now for checkpoints that are saved before `close_window`."""
        if not self.window:
            self.window = {name: buffer.clone() for name, buffer in self.named_buffers()}

    def close_window(self) -> None:
        """Let checkpoints hold the buffers as they are."""
        self.window = {}

    def values(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: the buffers, or what they held at the start of an open window of accumulated
        batches, since that resumes at its first batch."""
        return self.window or self.state_dict()

    def smooth(self, kind: Literal["mean", "gram"], value: Tensor, present: Tensor, smoothing: float) -> Tensor:
        """Return the running mean of losses or Gram matrix with this value in it; each entry counts its own batches."""
        here = tuple(slice(size) for size in value.shape)
        total, count = getattr(self, kind)[here], getattr(self, f"{kind}_count")[here]
        total.copy_(torch.where(present, smoothing * total + (1 - smoothing) * value, total))
        count.copy_(torch.where(present, smoothing * count + (1 - smoothing), count))
        return total.double() / count
