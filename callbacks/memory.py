"""The most memory a run has needed so far."""

from __future__ import annotations

import resource
import sys
from typing import Any

import pytorch_lightning as pl
import torch

from .throughput import log_scalars, logs_now

GIB = 2**30


def peak_memory(device: torch.device) -> float:
    """Return the peak in GiB: what the CUDA allocator handed out, elsewhere the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class MemoryPeak(pl.Callback):
    """Log `memory/peak_gib`, the peak of the process that needs most, whenever Lightning logs."""

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start anew on a CUDA device; the peak of a process cannot be taken back."""
        self._step = trainer.global_step
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log where Lightning does."""
        if not logs_now(trainer) or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        peak = peak_memory(pl_module.device)
        if trainer.world_size > 1:
            highest = torch.tensor(peak, dtype=torch.float64, device=pl_module.device)
            peak = float(trainer.strategy.reduce(highest, reduce_op="max"))
        log_scalars(trainer, {"memory/peak_gib": peak})
