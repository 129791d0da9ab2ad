"""Spare a training step what Lightning does for nobody.

- Lightning goes through every callback at each of the six hooks of a training step, and the empty ones that a callback
  inherits cost as much as any: about 120 Python calls a step and callback. The module's own empty hooks cost about 25
  each. It leaves out a hook that is not callable.
- Around each of the 70 places of a step that a profiler could look at, it makes a generator even where there is none.
- It parses the signature of `training_step` twice a step, and describes each logged value anew: see `light_results.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.profilers import PassThroughProfiler

from .light_results import use_light_results

TRAINING = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
PER_BATCH = (
    *TRAINING,
    *(f"on_{stage}_batch_{moment}" for stage in ("validation", "test", "predict") for moment in ("start", "end")),
)


class NoProfiler(PassThroughProfiler):
    """Lightning's stand-in for no profiler, with one context for all places."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """Return a context that does nothing."""
        return self._nothing


class LightLoop(pl.Callback):
    """Make each step of a run cheaper in Python; nothing that is computed, logged or saved changes.

    It works on the trainer's callbacks, its profiler where it was not asked for one, its collections of logged values,
    and, while a run lasts, the hooks that the module only inherits.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave out what nobody uses."""
        known: Any = trainer
        skip_unused_hooks(known.callbacks)
        if type(known.profiler) is PassThroughProfiler:
            known.profiler = NoProfiler()
        use_light_results(trainer)
        _skip(pl_module, pl.LightningModule, TRAINING)
        _keep_signature(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the module its hooks back."""
        for hook in TRAINING:
            if vars(pl_module).get(hook, self) is None:
                delattr(pl_module, hook)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the module its hooks back."""
        self.teardown(trainer, pl_module, "")


def skip_unused_hooks(callbacks: Iterable[pl.Callback]) -> None:
    """Set the hooks of a batch that a callback only inherits from `pl.Callback` to None, on the object.

    The classes keep theirs: a subclass may call `super().on_train_batch_end(...)` as ever.
    """
    for callback in callbacks:
        _skip(callback, pl.Callback, PER_BATCH)


def _skip(owner: Any, parent: type, hooks: Iterable[str]) -> None:
    for hook in hooks:
        if getattr(type(owner), hook) is getattr(parent, hook) and hook not in vars(owner):
            setattr(owner, hook, None)


def _keep_signature(module: pl.LightningModule) -> None:
    """Write the signature of `training_step` down, where `inspect` looks before it parses the function."""
    step = type(module).training_step
    step = getattr(step, "__wrapped__", step)
    if inspect.isfunction(step) and not hasattr(step, "__signature__"):
        step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
