"""Attributes that one module instance holds in place of its class's, for as long as a technique is attached."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl


class Override:
    """Put a value in place of a method, on the instance only; `undo` brings back what was there.

    Args:
        module: Whose method.
        name: Its name.
        value: What stands for it.
    """

    def __init__(self, module: pl.LightningModule, name: str, value: Any) -> None:
        self.module, self.name = module, name
        self.before = vars(module).get(name)
        setattr(module, name, value)

    def undo(self) -> None:
        """Bring back what was there before."""
        vars(self.module).pop(self.name, None)
        if self.before is not None:
            setattr(self.module, self.name, self.before)


class _Step:
    """Stands for `training_step`; an object, since a copy of the module must run its own step."""

    def __init__(self, step: Callable[..., Any], run: Callable[[Callable[[], Any]], Any]) -> None:
        self.step, self.run = step, run
        # Lightning looks there to see which arguments the module's own step takes.
        self.__wrapped__ = inspect.unwrap(step)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(partial(self.step, *args, **kwargs))


def override_training_step(module: pl.LightningModule, run: Callable[[Callable[[], Any]], Any]) -> Override:
    """Let `run(step)` stand for `training_step`; `step()` is the step on the same batch, as often as it is called.

    Args:
        module: Whose step.
        run: Takes the step without arguments, returns what stands for its result.
    """
    return Override(module, "training_step", _Step(module.training_step, run))
