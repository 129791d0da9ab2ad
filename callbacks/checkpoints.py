"""The newest and the best checkpoint of a run, each written once and named by a link."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from ..errors import InputError
from ..strategies.checkpoints import remove, sync_file

_SAVED = re.compile(r"step=\d{8,}\.ckpt")
_LEFT_OVER = re.compile(r"\.?step=\d{8,}\.ckpt\.(partial|old)|(last|best)\.ckpt\.new")


class Checkpoints(Checkpoint):
    """Keep the last and the best checkpoint of a run.

    A checkpoint is saved once, as `step=00000120.ckpt`, by the strategy (kexue's write a file or a directory whole or
    not at all). Then `last.ckpt` and, where it is the best so far, `best.ckpt` are pointed at it, and what no link
    names is deleted. A failure while saving leaves the earlier checkpoints and links as they were.

    It saves after validation (without validation: at the end of the epoch), every `every_n_steps` steps in between, and
    at the end of training. Only a value from the validation of these very weights makes a checkpoint the best.

    Args:
        folder: Where checkpoints go, the same folder on every process.
        monitor: Logged key that decides which is the best; None: the last one is.
        mode: Whether a smaller (`min`) or a larger (`max`) value is better.
        every_n_epochs: Save at the end of each n-th epoch only.
        every_n_steps: Save after each n-th optimiser step too, in the middle of an epoch; None: not.

    Raises:
        InputError: If an argument is out of range, or no key `monitor` was logged when it is needed.
    """

    def __init__(
        self,
        folder: str | Path,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise InputError(f"Checkpoints(mode={mode!r}): use min or max.")
        if every_n_epochs < 1:
            raise InputError(f"Checkpoints(every_n_epochs={every_n_epochs}): use 1 or more.")
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"Checkpoints(every_n_steps={every_n_steps}): use 1 or more, or null for none.")
        self.folder = Path(folder)
        self.monitor = monitor
        self.mode = mode
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self._last: str | None = None
        self._best: str | None = None
        self._best_value: float | None = None
        self._step_seen = 0
        self._due = False
        self._open = False

    @property
    def last_model_path(self) -> str:
        """Path of the newest checkpoint, empty before the first."""
        return str(self.folder / self._last) if self._last else ""

    @property
    def best_model_path(self) -> str:
        """Path of the best checkpoint, empty before the first with a finite monitored value."""
        return str(self.folder / self._best) if self._best else ""

    @property
    def best_value(self) -> float | None:
        """Monitored value of the best checkpoint."""
        return self._best_value

    def state_dict(self) -> dict[str, Any]:
        """Names and the best value; names, not paths, so that a run directory can be moved.

        `open` is there where the validation of the last one was still to come, with whether it was to be saved then.
        """
        state = {"last": self._last, "best": self._best, "best_value": self._best_value}
        return {**state, "open": {"due": self._due}} if self._open else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what the resumed checkpoint knew of its neighbours."""
        self._last, self._best = state_dict["last"], state_dict["best"]
        self._best_value = state_dict["best_value"]
        self._open = "open" in state_dict
        self._due = self._open and state_dict["open"]["due"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget what the folder does not hold: the run may continue in another folder, or from an older checkpoint."""
        self._step_seen = trainer.global_step
        self._due = self._due and self._open
        resumed = trainer.global_step > 0
        there = [resumed and name is not None and (self.folder / name).exists() for name in (self._last, self._best)]
        last_there, best_there = trainer.strategy.broadcast(there)
        if not last_there:
            self._last = None
        if not best_there:
            self._best = self._best_value = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save each n-th step, or leave it to the validation or the end of the epoch that follows at once."""
        if self.every_n_steps is None or trainer.global_step == self._step_seen:
            return  # also in the middle of a window of accumulated gradients
        self._step_seen = trainer.global_step
        if self._step_seen % self.every_n_steps:
            return
        loop = trainer.fit_loop
        fetcher = loop._data_fetcher
        assert fetcher is not None
        if loop.epoch_loop.batch_progress.is_last_batch or loop.epoch_loop._should_check_val_fx(fetcher):
            self._due = True
        else:
            self._save(trainer, None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save with the value that this validation gave."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and (self._due or self._epoch_is_due(trainer)):
            self._save(trainer, self._monitored(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where no validation has done so."""
        if self._due or self._epoch_is_due(trainer):
            # After an epoch without validation the value at hand would be that of older weights.
            self._save(trainer, None if trainer.enable_validation else self._monitored(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the last step if nothing has."""
        self._save(trainer, None)

    def save_at_once(self, trainer: pl.Trainer, *, validated: bool = True) -> None:
        """Save now, on every process, because the run is about to end.

        Args:
            trainer: Of the run.
            validated: False in the middle of a validation; the continued run repeats it, and then saves this step again
                with the value it gave, as it would have done.
        """
        self._save(trainer, None, validated)

    def save_next(self) -> None:
        """Save at the end of the epoch or after the validation that follows, whichever comes first."""
        self._due = True

    def _epoch_is_due(self, trainer: pl.Trainer) -> bool:
        return (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _monitored(self, trainer: pl.Trainer) -> float | None:
        if self.monitor is None:
            return None
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise InputError(
                f"Checkpoints(monitor={self.monitor!r}): nothing of this name was logged; "
                f"choose one of: {known}; or monitor=null to keep the last only."
            )
        return float(trainer.callback_metrics[self.monitor])

    def _is_best(self, value: float | None) -> bool:
        if self.monitor is None:
            return True
        if value is None or not math.isfinite(value):
            return False
        if self._best_value is None:
            return True
        return value < self._best_value if self.mode == "min" else value > self._best_value

    def _save(self, trainer: pl.Trainer, value: float | None, validated: bool = True) -> None:
        """Save on every process; move links and delete on the first."""
        name = f"step={trainer.global_step:08d}.ckpt"
        known = name == self._last and not self._open
        if known or trainer.fast_dev_run or not trainer.global_step:  # pyright: ignore[reportAttributeAccessIssue]
            return
        if trainer.is_global_zero:
            self._delete(_LEFT_OVER, keep=set())
        # Every process goes by the first one's value. It also keeps them from writing before the folder is clean.
        value = trainer.strategy.broadcast(value)
        before = self._last, self._best, self._best_value, self._open
        # The state goes into the checkpoint itself, so it changes first.
        if self._is_best(value):
            self._best, self._best_value = name, value
        self._last, self._open = name, not validated
        try:
            trainer.save_checkpoint(self.folder / name, weights_only=False)
        except BaseException:
            self._last, self._best, self._best_value, self._open = before
            raise
        self._due = False
        if trainer.is_global_zero:
            self._point("last.ckpt", name)
            if self._best == name:
                self._point("best.ckpt", name)
            named = {link.readlink().name for link in self.folder.glob("*.ckpt") if link.is_symlink()}
            self._delete(_SAVED, keep=named)
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)  # type: ignore[arg-type]  # as Lightning's own ModelCheckpoint does

    def _point(self, link: str, name: str) -> None:
        """Let a link name another checkpoint; whoever looks finds either the old or the new one."""
        fresh = self.folder / f"{link}.new"
        fresh.symlink_to(name)
        fresh.replace(self.folder / link)
        sync_file(self.folder)

    def _delete(self, pattern: re.Pattern[str], keep: set[str]) -> None:
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if pattern.fullmatch(path.name) and path.name not in keep:
                remove(path)
