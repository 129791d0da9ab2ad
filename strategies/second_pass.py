"""What techniques share that run the training step more than once on the same batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from ..errors import InputError
from .overrides import Override, override_training_step
from .technique import Technique


class SecondPass(Technique):
    """A technique whose `run(module, step)` may call `step()` several times and returns one result.

    All passes happen inside the wrapped forward and end in one backward pass, so DDP and every stage of ZeRO average
    gradients once, as always.
    """

    def attach(self, module: pl.LightningModule) -> None:
        if not module.automatic_optimization:
            raise InputError(
                f"{type(self).__name__}: {type(module).__name__} steps its optimiser inside training_step, which "
                "cannot run twice; use automatic_optimization=True."
            )
        self._override = override_training_step(module, partial(self.run, module))

    def detach(self, module: pl.LightningModule) -> None:
        if hasattr(self, "_override"):
            self._override.undo()
            del self._override

    def run(self, module: pl.LightningModule, step: Callable[[], Any]) -> Any:
        """Return what stands for the result of `training_step`."""
        raise NotImplementedError


@contextmanager
def without_logging(module: pl.LightningModule) -> Iterator[None]:
    """Keep a module's `self.log` silent: what it logs is of its first pass."""
    silent = Override(module, "log", lambda *_, **__: None)  # log_dict calls it too
    try:
        yield
    finally:
        silent.undo()


def loss_of(outputs: Any) -> Tensor:
    """The loss in what `training_step` returned."""
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs


def combined(first: Any, second: Any, combine: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """The outputs of the first pass, with the losses of both, also those of single tasks under `losses`."""
    loss = combine(loss_of(first), loss_of(second))
    if not isinstance(first, Mapping):
        return loss
    outputs = {**first, "loss": loss}
    if "losses" in first:
        outputs["losses"] = {task: combine(value, second["losses"][task]) for task, value in first["losses"].items()}
    return outputs
