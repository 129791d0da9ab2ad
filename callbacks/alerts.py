"""A message to whoever waits for a run when it goes wrong."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from .throughput import logs_now

log = logging.getLogger("kexue.alerts")


def alert(trainer: pl.Trainer, title: str, text: str) -> None:
    """Send a message through every logger that has a way to (W&B: mail or Slack), and write it to the log."""
    if trainer.is_global_zero:
        log.warning("%s: %s", title, text)
        for logger in trainer.loggers:
            send = getattr(logger, "alert", None)
            if callable(send):
                send(title=title, text=text, level="ERROR")


class Alerts(pl.Callback):
    """Say when the loss is not finite, once until it is finite again, and when the run fails.

    A preemption is told by the logger itself, which is closed at that moment. The loss is looked at on the device in
    every step and read when Lightning logs: nothing is waited for in between. Any process's loss counts.
    """

    def __init__(self) -> None:
        self._bad: Tensor | None = None
        self._told = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, and tell where Lightning logs."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            bad = ~torch.isfinite(loss.detach()).all()
            self._bad = bad if self._bad is None else self._bad | bad
        if not logs_now(trainer):
            return
        bad = self._bad is not None and bool(self._bad)
        self._bad = None
        bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad and not self._told:
            text = f"at or before step {trainer.global_step}; lower the learning rate, or clip gradients"
            alert(trainer, "the loss is not finite", text)
        self._told = bad

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell why the run ends."""
        if isinstance(exception, Exception):
            alert(trainer, "the run failed", f"{type(exception).__name__}: {exception}"[:500])
