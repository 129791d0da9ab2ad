"""Spare a training step what Lightning does at every hook for nobody.

Lightning goes through every callback at each of the six hooks of a training step, and the empty ones that a callback
inherits cost as much as any: about 120 Python calls a step and callback. It leaves out a hook that is not callable.
Around each of the 70 places of a step that a profiler could look at, it makes a generator even where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import pytorch_lightning as pl
from pytorch_lightning.profilers import PassThroughProfiler

PER_BATCH = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    *(f"on_{stage}_batch_{moment}" for stage in ("validation", "test", "predict") for moment in ("start", "end")),
)


class NoProfiler(PassThroughProfiler):
    """Lightning's stand-in for no profiler, with one context for all places."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        """Return a context that does nothing."""
        return self._nothing


def lighten(trainer: pl.Trainer) -> None:
    """Leave out the unused hooks of a trainer's callbacks, and the profiler that it was not asked for."""
    skip_unused_hooks(trainer.callbacks)  # type: ignore[attr-defined]
    if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
        trainer.profiler = NoProfiler()  # type: ignore[attr-defined]


def skip_unused_hooks(callbacks: Iterable[pl.Callback]) -> None:
    """Set the hooks of a batch that a callback only inherits from `pl.Callback` to None, on the object.

    The classes keep theirs: a subclass may call `super().on_train_batch_end(...)` as ever.
    """
    for callback in callbacks:
        for hook in PER_BATCH:
            inherited = getattr(type(callback), hook) is getattr(pl.Callback, hook)
            if inherited and hook not in vars(callback):
                setattr(callback, hook, None)
