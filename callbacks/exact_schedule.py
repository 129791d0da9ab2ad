"""From cross-entropy to accuracy in the course of a run."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl

from ..errors import InputError
from ..nn.losses import ExactLoss


def exact_schedule(
    progress: float, start: float = 10.0, end: float = 0.3, after: float = 0.5, until: float = 0.9
) -> tuple[float, float]:
    """Return sigma and the share of cross-entropy at a point of the run.

    Args:
        progress: 0 at the start of the run, 1 at its end.
        start: First sigma.
        end: Last sigma; between `after` and `until`, its logarithm is a straight line.
        after: Share of the run that is left to cross-entropy alone.
        until: Share of the run after which sigma stays.
    """
    if progress < after:
        return start, 1.0
    way = 1.0 if progress >= until else (progress - after) / (until - after)
    return start * (end / start) ** way, 0.0


class ExactSchedule(pl.Callback):
    """Set `sigma` and `cross_entropy` of the module's `ExactLoss` before every step. Card: docs/cards/exact.md.

    Both follow from the number of the step, so a resumed run goes on where it was.

    Args:
        start: First sigma.
        end: Last sigma.
        after: Share of the run that is left to cross-entropy, 0 to below 1.
        until: Share of the run after which sigma stays, above `after`, at most 1.
        num_steps: Optimiser steps of the run; None: what the trainer will take.

    Raises:
        InputError: If an argument is out of range, the module has no `ExactLoss`, or the run has no end.
    """

    def __init__(
        self,
        start: float = 10.0,
        end: float = 0.3,
        after: float = 0.5,
        until: float = 0.9,
        num_steps: int | None = None,
    ) -> None:
        if start <= 0 or end <= 0:
            raise InputError(f"ExactSchedule(start={start}, end={end}): use numbers above 0.")
        if not 0 <= after < until <= 1:
            raise InputError(f"ExactSchedule(after={after}, until={until}): use 0 <= after < until <= 1.")
        self.start = start
        self.end = end
        self.after = after
        self.until = until
        self.num_steps = num_steps
        self._losses: list[ExactLoss] = []
        self._steps = math.inf

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the losses, and how long the run is."""
        self._losses = [module for module in pl_module.modules() if isinstance(module, ExactLoss)]
        if not self._losses:
            raise InputError(f"ExactSchedule: {type(pl_module).__name__} has no ExactLoss; choose loss=exact.")
        self._steps = self.num_steps or trainer.estimated_stepping_batches
        if math.isinf(self._steps):
            raise InputError("ExactSchedule(num_steps=None): the run has no end; give num_steps or trainer.max_steps.")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set them."""
        progress = trainer.global_step / self._steps
        sigma, share = exact_schedule(progress, self.start, self.end, self.after, self.until)
        for loss in self._losses:
            loss.sigma, loss.cross_entropy = sigma, share
