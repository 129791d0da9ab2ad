"""A message to whoever waits for a run when it goes wrong."""

from __future__ import annotations

import logging

import pytorch_lightning as pl

from ..redaction import hide

log = logging.getLogger("kexue.alerts")


def alert(trainer: pl.Trainer, title: str, text: str) -> None:
    """Send a message through every logger that has a way to (W&B: mail or Slack).

    A logger that fails at it is named in the log: what the message is about must not be hidden by that.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            send = getattr(logger, "alert", None)
            if callable(send):
                try:
                    send(title=title, text=text, level="ERROR")
                except Exception as error:
                    log.warning("%s could not send the alert: %s", type(logger).__name__, hide(str(error)))


class Alerts(pl.Callback):
    """Say why a run fails, such as a loss that is not finite (`StopOnNonFinite` raises it).

    A preemption is told by the logger itself, which is closed at that moment.
    """

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tell it."""
        if isinstance(exception, Exception):
            alert(trainer, "the run failed", f"{type(exception).__name__}: {exception}"[:500])
