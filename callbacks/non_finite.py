"""End a run at the first loss that is not finite, before it reaches the weights or a checkpoint."""

from __future__ import annotations

import math

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..errors import InputError


class StopOnNonFinite(pl.Callback):
    """Raise an error that names step and process when a loss is NaN or infinite.

    On a CPU every loss is looked at before its backward pass, so the weights stay as they were. Looking at a number on
    a GPU waits for it: there the losses are gathered in one flag on the device, which is read every `every_n_steps`
    optimiser steps and before a checkpoint is saved, so no checkpoint holds weights that such a loss has spoilt. Each
    process looks at its own loss and asks nobody; the others end in their next collective, or by their launcher.

    Args:
        every_n_steps: Steps between two looks at a GPU's flag.

    Raises:
        InputError: In the run, with the step and what to try.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise InputError(f"StopOnNonFinite(every_n_steps={every_n_steps}): use 1 or more.")
        self.every_n_steps = every_n_steps
        self._finite: Tensor | None = None
        self._looked = 0

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Look at the loss, or note on the device what it is."""
        if not loss.is_cuda:
            self._check(trainer, math.isfinite(loss.item()) if loss.numel() == 1 else torch.isfinite(loss).all())
            return
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite
        if trainer.global_step - self._looked >= self.every_n_steps:
            self._look(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: object) -> None:
        """Look before weights are written."""
        self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the last steps."""
        self._look(trainer)

    def _look(self, trainer: pl.Trainer) -> None:
        finite, self._finite = self._finite, None
        self._looked = trainer.global_step
        if finite is not None:
            self._check(trainer, finite)

    def _check(self, trainer: pl.Trainer, finite: Tensor | bool) -> None:
        if finite:
            return
        rank = f" on rank {trainer.global_rank}" if trainer.world_size > 1 else ""
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        raise InputError(
            f"the loss is not finite at step {trainer.global_step}{rank}: try a lower learning rate, "
            "trainer.gradient_clip_val=1.0 or trainer.precision=bf16-mixed; trainer.detect_anomaly=true finds the "
            f"operation{f'; the last checkpoint is {last}' if last else ''}"
        )
