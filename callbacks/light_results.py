"""Logged values that cost a step no more than adding a number up.

For every `self.log`, Lightning describes the value anew, compares the description with the one it has, and looks for
tensors in all that belongs to the stored value, to move them to where they are already: nearly half of the Python calls
of a step around a small model. Here a value that was logged before by the same hook with the same options goes straight
to its sum; anything else goes Lightning's way.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultCollection, _ResultMetric
from torch import Tensor

Known = tuple[dict[str, Any], torch.device, _ResultMetric]


class LightResults(_ResultCollection):
    """Lightning's collection of logged values, with a short way for those that it knows."""

    def __init__(self, training: bool) -> None:
        super().__init__(training)
        self._known: dict[tuple[str, str], Known] = {}

    @torch.compiler.disable
    def log(self, fx: str, name: str, value: Any, batch_size: int | None = None, **options: Any) -> None:  # type: ignore[override]
        """Add a value to what was logged under its name; see `LightningModule.log`."""
        known = self._known.get((fx, name))
        if (
            known is not None
            and isinstance(value, Tensor)
            and value.device == known[1]
            and options == known[0]
            and self.dataloader_idx is None
        ):
            metric = known[2]
            if not metric.meta.enable_graph:
                value = value.detach()
            metric.forward(value, self._extract_batch_size(metric, batch_size, metric.meta))
            metric.has_reset = False
            return
        _ResultCollection.log(self, fx, name, value, batch_size=batch_size, **options)  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(value, Tensor) and self.dataloader_idx is None:
            self._known[fx, name] = options, value.device, self[f"{fx}.{name}"]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move all values to another device, as at the end of a run."""
        self._known.clear()
        return super().to(*args, **kwargs)


def use_light_results(trainer: pl.Trainer) -> None:
    """Let the loops of a trainer keep logged values so from its next run on."""
    known: Any = trainer
    training = known.fit_loop.epoch_loop
    for loop in (training, training.val_loop, known.validate_loop, known.test_loop):
        if type(loop._results) is _ResultCollection:
            loop._results = LightResults(loop._results.training)
