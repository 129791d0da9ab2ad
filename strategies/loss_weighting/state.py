"""What loss weighting keeps between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .rules import Rule


class RunningMean(nn.Module):
    """An exponential mean without bias towards its start, in which each entry counts its own batches.

    Args:
        shape: Of the values.
        smoothing: Share of the past, from 0 to below 1.
    """

    total: Tensor
    count: Tensor

    def __init__(self, shape: Sequence[int], smoothing: float) -> None:
        super().__init__()
        self.smoothing = smoothing
        for name in ("total", "count"):
            self.register_buffer(name, torch.zeros(tuple(shape), dtype=torch.float64))

    def forward(self, value: Tensor, present: Tensor) -> Tensor:
        """Return the mean with this value in it where it is present, NaN where nothing ever was."""
        fresh = (1 - self.smoothing) * present.double()
        self.total.mul_(1 - fresh).add_(fresh * torch.where(present, value, 0.0))
        self.count.mul_(1 - fresh).add_(fresh)
        return self.total / self.count


class LossWeights(nn.Module):
    """What loss weighting remembers of its tasks: the last weights, running means, and the buffers of the rule.

    Args:
        rule: The rule.
        smoothing: Share of the past in the running means; 0: there are none.
    """

    weights: Tensor

    def __init__(self, rule: Rule, smoothing: float = 0.0) -> None:
        super().__init__()
        self.rule = rule
        self.smoothing = smoothing
        self.tasks: list[str] = []
        self.means: RunningMean | None = None
        self.gram: RunningMean | None = None
        self._window: dict[str, Tensor] = {}

    def bind(self, tasks: Sequence[str]) -> None:
        """Learn the names of the tasks and their order; make the buffers, as before the first batch."""
        self.rule.bind(tasks)
        self.tasks = list(tasks)
        self.register_buffer("weights", torch.ones(len(tasks), dtype=torch.float64))
        if self.smoothing:
            self.means = RunningMean([len(tasks)], self.smoothing)
            self.gram = RunningMean([len(tasks)] * 2, self.smoothing) if self.rule.uses_gradients else None

    def open_window(self) -> None:
        """Keep what the buffers hold now for checkpoints that are saved before `close_window`."""
        if not self._window:
            self._window = {name: value.clone() for name, value in self.state_dict().items()}

    def close_window(self) -> None:
        """Let checkpoints hold the buffers as they are."""
        self._window = {}

    def values(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds: the buffers, or what they held at the start of an open window of accumulated
        batches, since that resumes at its first batch."""
        return self._window or self.state_dict()

    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Go on from `values`. What only these options keep starts anew, what only others kept is left out."""
        self.load_state_dict(values, strict=False)
