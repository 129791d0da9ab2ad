"""What loss weighting keeps between steps, in buffers of the module that it is attached to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import InputError
from .rules import MAX_TASKS, Rule

MAX_NAME = 64


class LossWeights(nn.Module):
    """What loss weighting remembers: names of the tasks, running means, last weights, and the buffers of the rule."""

    names: Tensor
    weights: Tensor
    mean: Tensor
    mean_count: Tensor
    gram: Tensor
    gram_count: Tensor

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.window: dict[str, Tensor] = {}
        self.register_state_dict_post_hook(_save_window)
        self.register_buffer("names", torch.zeros(MAX_TASKS, MAX_NAME, dtype=torch.uint8))
        self.register_buffer("weights", torch.ones(MAX_TASKS))
        for name, shape in (("mean", (MAX_TASKS,)), ("gram", (MAX_TASKS, MAX_TASKS))):
            self.register_buffer(name, torch.zeros(shape))
            self.register_buffer(f"{name}_count", torch.zeros(shape))

    def _apply(self, fn: Any, recurse: bool = True) -> LossWeights:
        # Follow the model to its device but not into bfloat16, in which running means stand still.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def open_window(self) -> None:
        """Keep what the buffers hold now for checkpoints that are saved before `close_window`."""
        if not self.window:
            self.window = {name: buffer.clone() for name, buffer in self.named_buffers()}

    def close_window(self) -> None:
        """Let checkpoints hold the buffers as they are."""
        self.window = {}

    def read_names(self) -> list[str]:
        """Return the names that are kept, none at the start of a run."""
        rows = [bytes(row).rstrip(b"\0").decode() for row in self.names.cpu().numpy()]
        return [name for name in rows if name]

    def write_names(self, tasks: Sequence[str]) -> None:
        """Keep the names of the tasks."""
        if len(tasks) > MAX_TASKS:
            raise InputError(f"LossWeighting: {len(tasks)} tasks; use {MAX_TASKS} or fewer.")
        for row, name in enumerate(tasks):
            text = name.encode()
            if not 0 < len(text) <= MAX_NAME:
                raise InputError(f"LossWeighting: the task {name!r} has no name of 1 to {MAX_NAME} bytes; rename it.")
            self.names[row, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)

    def smooth(self, kind: Literal["mean", "gram"], value: Tensor, present: Tensor, smoothing: float) -> Tensor:
        """Return the running mean of losses or Gram matrix with this value in it; each entry counts its own batches."""
        here = tuple(slice(size) for size in value.shape)
        total, count = getattr(self, kind)[here], getattr(self, f"{kind}_count")[here]
        total.copy_(torch.where(present, smoothing * total + (1 - smoothing) * value, total))
        count.copy_(torch.where(present, smoothing * count + (1 - smoothing), count))
        return total.double() / count


def _save_window(state: nn.Module, entries: dict[str, Any], prefix: str, _: Any) -> None:
    """Save what there was at the start of an open window of accumulated batches: it resumes at its first batch."""
    assert isinstance(state, LossWeights)
    entries.update({f"{prefix}{name}": value for name, value in state.window.items()})
