"""What a run does when it is asked to stop: a complete checkpoint at the next step boundary, and exit code 75."""

from __future__ import annotations

import contextlib
import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from pytorch_lightning.trainer.states import TrainerFn

from ..signals import Preempted, StopRequest, installed, spare_workers
from .checkpoints import Checkpoints
from .light_loop import skip_unused_hooks

log = logging.getLogger("kexue.preemption")


class _Signals(_SignalConnector):
    """Takes the place of Lightning's handlers, which start a collective inside a handler, end without a checkpoint, or
    save in the middle of a step and call a scheduler that a container does not have (Lightning 2.6)."""

    def __init__(self, trainer: pl.Trainer) -> None:
        super().__init__(trainer)
        outer = installed()
        self.request = outer or StopRequest()
        self.stopping = False
        self._own = outer is None
        if self._own:
            self.request.install()

    def register_signal_handlers(self) -> None:
        """Do nothing: the handler is in place since this object was made."""

    def teardown(self) -> None:
        """Bring back the handlers from before, unless the process is about to end."""
        if self._own and not self.stopping:
            self.request.restore()


class Preemption(pl.Callback):
    """Answer SIGUSR1, SIGUSR2 and SIGTERM: save where the run stands, then end with exit code 75, all processes alike.

    One process that was asked suffices. All learn of it at the same step by a number that travels beside the backward
    pass over a gloo group of its own, so no device is ever waited for; it replaces the broadcast that Lightning makes,
    and waits for, before every batch. In the middle of a validation the checkpoint continues at its start; during a
    test nothing is left to save.

    Checkpoints are written by the `Checkpoints` callback where there is one, else to `checkpoints/` in the trainer's
    `default_root_dir`. Whoever started the run sees exit code 75 and starts it again: `kexue submit` writes batch
    scripts that do.

    Raises:
        Preempted: in `fit` or `test`, after the checkpoint is complete; a SystemExit.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor | list[float]] | None = None
        self._stopping = False
        self._equal = True
        self._signals: _Signals | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen; and take the last place before those that write checkpoints, when the others have settled theirs."""
        known: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        others = [callback for callback in known if callback is not self and not isinstance(callback, _Leave)]
        place = next((i for i, callback in enumerate(others) if isinstance(callback, Checkpoint)), len(others))
        leave = _Leave(self)
        skip_unused_hooks([leave])
        trainer.callbacks = [leave, *others[:place], self, *others[place:]]  # pyright: ignore[reportAttributeAccessIssue]
        self._signals = trainer._signal_connector = _Signals(trainer)
        self._pending = None
        self._stopping = False
        # Lightning's own agreement: a broadcast before each batch, whose result the host waits for.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        self._spare_workers_of(trainer.strategy)

    @staticmethod
    def _spare_workers_of(strategy: Any) -> None:
        """Let the workers of loaders that the strategy sees from now on live through a first signal."""
        if "process_dataloader" in vars(strategy):
            return
        process = strategy.process_dataloader

        def spared(loader: object) -> object:
            spare_workers(loader)
            return process(loader)

        strategy.process_dataloader = spared

    # Agreement

    def _start(self, batches: float = 0) -> None:
        """Begin to ask all processes; `batches` is a count that should be the same on each."""
        assert self._signals is not None
        asked = self._signals.request.received is not None
        values = [float(asked), batches, -batches]
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            self._pending = None, values
            return
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        shared = torch.tensor(values, device="cpu")
        self._pending = dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group, async_op=True), shared

    def _agreed(self) -> bool:
        """Whether any process was asked to stop before it began to ask; the same answer on each."""
        if self._pending is None:
            self._start()
        assert self._pending is not None
        (work, values), self._pending = self._pending, None
        if work is not None:
            work.wait()
        asked, most, fewest = values.tolist() if isinstance(values, torch.Tensor) else values
        self._equal = most == -fewest and math.isfinite(most)
        self._stopping = self._stopping or asked > 0
        return self._stopping

    # Training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave where the request came before the first step: what there is to continue from is there already."""
        if self._agreed():
            self._leave(trainer)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask while the optimiser steps."""
        if self._pending is None:
            self._start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at once, or leave it to the validation or the end of the epoch that follows."""
        loop = trainer.fit_loop.epoch_loop
        assert trainer.fit_loop._data_fetcher is not None
        validation = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        if validation and hasattr(trainer.strategy, "validation_follows"):
            trainer.strategy.validation_follows()  # type: ignore[operator]
        if self._agreed() and not validation and not loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the end of an epoch that no validation follows."""
        if self._stopping:
            saver = _saver(trainer)
            if saver is None:
                self._save(trainer)
            else:
                saver.save_next()  # in its turn, with the value to judge by

    def leave_if_saved(self, trainer: pl.Trainer) -> None:
        """Leave before the next step, now that the values of the saved one are logged."""
        if self._stopping:
            self._leave(trainer)

    # Evaluation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save instead of validating if it was asked for meanwhile."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._start(sum(trainer.num_val_batches))
            self._leave_validation(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Cut the validation off; not where processes validate different numbers of batches."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._equal:
            self._leave_validation(trainer)

    def _leave_validation(self, trainer: pl.Trainer) -> None:
        if self._agreed():
            inside = getattr(trainer.strategy, "cut_off_validation", contextlib.nullcontext)
            with inside():
                self._save(trainer, validated=False)
            self._leave(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave before the test."""
        self._start(sum(trainer.num_test_batches))
        if self._agreed():
            self._leave(trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        """Leave the test; the continued run repeats it."""
        if self._equal and self._agreed():
            self._leave(trainer)

    # Leaving

    def _save(self, trainer: pl.Trainer, validated: bool = True) -> None:
        saver = _saver(trainer)
        if saver is not None:
            saver.save_at_once(trainer, validated=validated)
        else:
            name = f"step={trainer.global_step:08d}.ckpt"
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / name)

    def _leave(self, trainer: pl.Trainer) -> None:
        assert self._signals is not None
        self._signals.stopping = True
        for logger in trainer.loggers:  # as Lightning does when a job is requeued
            logger.finalize("finished")
        trainer.strategy.barrier("preempted")  # where one ends before the others, srun and torchrun end those
        cause = self._signals.request.received or "another process was"
        reason = f"asked to stop ({cause}) at step {trainer.global_step}"
        if trainer.is_global_zero:
            log.info("%s; the same command continues from there", reason)
        raise Preempted(reason)


def _saver(trainer: pl.Trainer) -> Checkpoints | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)  # pyright: ignore[reportAttributeAccessIssue]


class _Leave(pl.Callback):
    """The first callback of all: of a step that the continued run will take, nothing is to be logged."""

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.preemption.leave_if_saved(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.preemption.leave_if_saved(trainer)
