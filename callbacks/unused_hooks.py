"""Spare a training step the hooks that a callback does not have.

Lightning goes through every callback at each of the six hooks of a training step, and the empty ones that a callback
inherits cost as much as any: a profiler's context each, about 120 Python calls a step and callback. It leaves out a
hook that is not callable.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytorch_lightning as pl

PER_BATCH = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    *(f"on_{stage}_batch_{moment}" for stage in ("validation", "test", "predict") for moment in ("start", "end")),
)


def skip_unused_hooks(callbacks: Iterable[pl.Callback]) -> None:
    """Set the hooks of a batch that a callback only inherits from `pl.Callback` to None, on the object.

    The classes keep theirs: a subclass may call `super().on_train_batch_end(...)` as ever.
    """
    for callback in callbacks:
        for hook in PER_BATCH:
            inherited = getattr(type(callback), hook) is getattr(pl.Callback, hook)
            if inherited and hook not in vars(callback):
                setattr(callback, hook, None)
