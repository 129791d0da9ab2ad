"""A message to whoever waits for a run when it goes wrong."""

from __future__ import annotations

import pytorch_lightning as pl


def alert(trainer: pl.Trainer, title: str, text: str) -> None:
    """Send a message through every logger that has a way to (W&B: mail or Slack)."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            send = getattr(logger, "alert", None)
            if callable(send):
                send(title=title, text=text, level="ERROR")


class Alerts(pl.Callback):
    """Say why a run fails, such as a loss that is not finite (`StopOnNonFinite` raises it).

    A preemption is told by the logger itself, which is closed at that moment.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell it."""
        if isinstance(exception, Exception):
            alert(trainer, "the run failed", f"{type(exception).__name__}: {exception}"[:500])
