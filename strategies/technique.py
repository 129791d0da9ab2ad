"""The contract between a strategy and what attaches to it: three touch points, none of them in the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer


class Technique:
    """A small object that changes how any LightningModule is trained, without the module knowing.

    A base strategy calls, in the order in which the techniques were given:

    1. `attach` once the module's networks exist (`configure_model` has run) and before anything wraps the module;
    2. `wrap_optimizer` when an optimiser has been made and before DeepSpeed or a grad scaler sees it;
    3. `combine` on what `training_step` returned, inside the wrapped forward, so that parameters that take part in the
       loss belong to the same backward pass as the rest.

    `detach` undoes `attach` when the run ends. A technique changes no `state_dict` key of the module, and keeps its
    state where checkpoints find it: in the optimiser's `state`, or in parameters and buffers of the module.
    """

    def attach(self, module: pl.LightningModule) -> None:
        """Change the module in place."""

    def detach(self, module: pl.LightningModule) -> None:
        """Undo `attach`."""

    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimiser that training uses, which may be the one given."""
        return optimizer

    def combine(self, outputs: Any, module: pl.LightningModule) -> Any:
        """Return what stands for the result of `training_step`."""
        return outputs

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({arguments})"


def check_techniques(owner: str, techniques: Iterable[Technique]) -> tuple[Technique, ...]:
    """Return the techniques as a tuple.

    Raises:
        TypeError: If one of them is not a `Technique` instance, or one kind is given twice.
    """
    techniques = tuple(techniques)
    for technique in techniques:
        if not isinstance(technique, Technique):
            what = f"the class {technique.__name__}" if isinstance(technique, type) else repr(technique)
            raise TypeError(f"{owner}(techniques=[...]) takes instances such as Lookahead(k=5), not {what}.")
    kinds = [type(technique) for technique in techniques]
    for kind in kinds:
        if kinds.count(kind) > 1:
            times = kinds.count(kind)
            raise TypeError(f"{owner}(techniques=[...]): {kind.__name__} is given {times} times, give it once.")
    return techniques
