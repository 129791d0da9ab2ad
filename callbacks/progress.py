"""A progress bar that costs nothing between two looks at it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning import callbacks
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text
from torch import Tensor


def show_metrics(metrics: dict[str, Any]) -> str:
    """Return `key value` pairs with four significant digits."""
    return "  ".join(f"{key} {float(value):.4g}" for key, value in metrics.items())


class _Bars(Progress):
    """Bars with a line of text below, which may be longer than what fits beside a bar."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note)


class ProgressBar(callbacks.ProgressBar):
    """Show where a run stands: a bar on a terminal, one line an epoch elsewhere (a file, a cluster's log).

    The bar has epoch, batch, speed, time left for the whole run, the loss, and below it the metrics of the last
    validation. Between two pictures a step costs a look at the clock; a value is fetched from the device only for a
    picture. Output goes to standard error, on the first process.

    Args:
        seconds: Least time between two pictures.
        console: Where to draw; None: standard error.
    """

    def __init__(self, seconds: float = 0.5, console: Console | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self._console = console or Console(stderr=True)
        self._enabled = True
        self._bar: _Bars | None = None
        self._train: TaskID | None = None
        self._eval: TaskID | None = None
        self._next = 0.0
        self._start = 0.0
        self._batches = 0
        self._loss = ""

    def enable(self) -> None:
        """Show progress."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing (every process but the first)."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        self._start = time.monotonic()
        self._batches = 0
        self._train = self._open("", trainer.num_training_batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw if it is time."""
        self._batches += 1
        if time.monotonic() >= self._next and self._bar is not None:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            self._loss = f"loss {loss.item():.4g}" if isinstance(loss, Tensor) else ""
            self._update(trainer, batch_idx + 1)
            self._draw()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fill the bar, or write the line of this epoch where there is no terminal."""
        if self._bar is not None:
            self._update(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.ready)
        elif self._enabled:
            metrics = {k: v for k, v in trainer.callback_metrics.items() if not k.endswith(("_step", "_epoch"))}
            elapsed = timedelta(seconds=round(time.monotonic() - self._start))
            parts = [
                self._epoch(trainer),
                f"step {trainer.global_step}",
                str(elapsed),
                self._speed(),
                show_metrics(metrics),
            ]
            self._write("  ".join(parts))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add a bar below."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._eval = self._open("validation", sum(batches))

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Draw if it is time."""
        self._advance()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the bar away and remember what was measured."""
        self._finish(trainer, "validation")
        if self._bar is not None and not trainer.sanity_checking:
            known = {k.removeprefix("val/"): v for k, v in trainer.callback_metrics.items() if k.startswith("val")}
            self._bar.note = f"epoch {trainer.current_epoch + 1} validation: {show_metrics(known)}"

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open a bar."""
        self._eval = self._open("test", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Draw if it is time."""
        self._advance()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._finish(trainer, "test")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open a bar."""
        self._eval = self._open("predict", sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Draw if it is time."""
        self._advance()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._finish(trainer, "predict")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back before anything is said about the error."""
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._close()

    def _open(self, description: str, total: float) -> TaskID | None:
        """Add a bar, and start drawing if this is the first; None where there is no terminal."""
        if not self._enabled or not self._console.is_terminal or self._console.is_dumb_terminal:
            return None
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = _Bars(*columns, console=self._console, auto_refresh=False)
            self._bar.start()
        return self._bar.add_task(description, total=None if math.isinf(total) else total, text="")

    def _draw(self) -> None:
        assert self._bar is not None
        self._bar.refresh()
        self._next = time.monotonic() + self.seconds

    def _update(self, trainer: pl.Trainer, done: int) -> None:
        assert self._bar is not None
        assert self._train is not None
        text = "  ".join(filter(None, [self._speed(), self._time_left(trainer, done), self._loss]))
        self._bar.update(self._train, description=self._epoch(trainer), completed=done, text=text)

    def _advance(self) -> None:
        if self._bar is not None and self._eval is not None:
            self._bar.advance(self._eval)
            if time.monotonic() >= self._next:
                self._draw()

    def _finish(self, trainer: pl.Trainer, description: str) -> None:
        """End an evaluation: within training its bar goes, alone it stays on the screen, elsewhere it is a line."""
        if self._bar is not None and self._eval is not None:
            if trainer.state.fn == "fit":
                self._bar.remove_task(self._eval)
            else:
                self._close()
        elif self._enabled and trainer.state.fn != "fit":
            self._write(f"{description} done")
        self._eval = None

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._train = self._eval = None

    def _write(self, line: str) -> None:
        # Not by rich, which would wrap it at the width of a terminal that is not there.
        self._console.file.write(line.rstrip() + "\n")
        self._console.file.flush()

    def _epoch(self, trainer: pl.Trainer) -> str:
        last = trainer.max_epochs
        return f"epoch {trainer.current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")

    def _speed(self) -> str:
        return f"{self._batches / (time.monotonic() - self._start):.3g} it/s" if self._batches else ""

    def _time_left(self, trainer: pl.Trainer, done: int) -> str:
        """Estimate by the pace so far, validation included."""
        left = math.inf
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            left = (trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches - done
        if trainer.max_steps > 0:
            left = min(left, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
        if math.isinf(left):
            return ""
        return f"{timedelta(seconds=round((time.monotonic() - self._start) / self._batches * left))} left"
