"""How many samples and tokens a run trains on in a second."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


def count_samples(batch: Any) -> int:
    """Return the length of the first tensor in a batch (a tensor, or mappings and sequences of them); 0 without."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    if isinstance(batch, Mapping):
        batch = batch.values()
    if isinstance(batch, Iterable) and not isinstance(batch, str):
        return next((count for part in batch if (count := count_samples(part))), 0)
    return 0


def logs_now(trainer: pl.Trainer) -> bool:
    """Tell at the end of a training batch whether Lightning logs the step that this batch belongs to."""
    every = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
    return every > 0 and trainer.global_step % every == 0


def log_scalars(trainer: pl.Trainer, values: dict[str, float]) -> None:
    """Hand values to the loggers under the step at which Lightning logs the batch at hand.

    `LightningModule.log` would cost some microseconds in every step for each key, also in the steps that log nothing.
    """
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


class Throughput(pl.Callback):
    """Log `throughput/samples_per_second`, `throughput/tokens_per_second` and `throughput/step_seconds`.

    Samples are counted by the first tensor of a batch, tokens by its entry `num_tokens` (a Python int) if any; both
    are summed over all processes. Reading data counts as time; validation and the writing of checkpoints do not.
    Counts are kept without touching the device; it is waited for only when Lightning logs (`log_every_n_steps`), and
    before a validation or a checkpoint.
    """

    def __init__(self) -> None:
        self._mark: float | None = None
        self._step = 0
        self._restart(0)

    def _restart(self, step: int) -> None:
        self._first_step = self._step = step
        self._seconds = 0.0
        self._samples = 0
        self._tokens = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting."""
        self._mark = None
        self._restart(trainer.global_step)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock again after what is not training."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log where Lightning does."""
        self._samples += count_samples(batch)
        if isinstance(batch, Mapping):
            self._tokens += batch.get("num_tokens", 0)
        due = logs_now(trainer) and trainer.global_step > self._step
        self._count_time(pl_module.device, wait=due)
        self._mark = time.perf_counter()
        if due:
            self._log(trainer, pl_module.device)

    def _count_time(self, device: torch.device, wait: bool) -> None:
        """Add the time since the clock was started, if it runs, and stop it."""
        if self._mark is None:  # a checkpoint was saved between the step and the end of its batch
            return
        if wait and device.type == "cuda":
            torch.cuda.synchronize(device)
        self._seconds += time.perf_counter() - self._mark
        self._mark = None

    def _log(self, trainer: pl.Trainer, device: torch.device) -> None:
        samples, tokens = float(self._samples), float(self._tokens)
        if trainer.world_size > 1:
            counts = torch.tensor([samples, tokens], dtype=torch.float64, device=device)
            samples, tokens = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        steps = trainer.global_step - self._first_step
        values = {
            "throughput/samples_per_second": samples / self._seconds,
            "throughput/step_seconds": self._seconds / steps,
        }
        if tokens:
            values["throughput/tokens_per_second"] = tokens / self._seconds
        self._restart(trainer.global_step)
        log_scalars(trainer, values)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._count_time(pl_module.device, wait=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stop the clock."""
        self._count_time(pl_module.device, wait=True)
