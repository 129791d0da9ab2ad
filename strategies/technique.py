"""The contract between a strategy and what attaches to it: four touch points, none of them in the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer

from ..errors import InputError


class Technique:
    """A small object that changes how any LightningModule is trained, without the module knowing.

    A base strategy calls, in the order in which the techniques were given:

    1. `attach` once the module's networks exist (`configure_model` has run) and before anything wraps the module;
    2. `wrap_optimizer` when an optimiser has been made and before DeepSpeed or a grad scaler sees it;
    3. `combine` on what `training_step` returned, inside the wrapped forward, so that parameters that take part in the
       loss belong to the same backward pass as the rest;
    4. `exchange`, for the one technique whose `evaluates` names weights of its own (slow ones, an average): before and
       after each validation inside a fit and each checkpoint, after a checkpoint has been read to go on from it, and
       once at the end of the fit. A checkpoint's `state_dict`, a validation, and the module that `fit` leaves
       behind therefore hold the weights named, while training goes on from its own to the last bit.

    `detach` undoes `attach` when the run ends. A technique changes no `state_dict` key of the module. What it keeps
    between steps lies where checkpoints find it: for each parameter in the optimiser's `state`, where ZeRO divides it,
    and anything else in `state_dict` of its own, which the strategy saves beside the module's.
    """

    copies: tuple[str, ...] = ()
    """Keys of the optimiser's state under which it keeps copies of the weights: where ZeRO joins a parameter that has
    none yet to others that do, its own weights stand for it."""

    follows: tuple[str, ...] = ()
    """Techniques that have to come before this one in the list, where they are in it at all."""

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

    def state_dict(self) -> dict[str, Any]:
        """Return what it keeps between steps, equal on all processes: tensors and plain data, empty for nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; called after `attach` when a run is resumed that had such a technique."""

    @property
    def evaluates(self) -> str | None:
        """Name of the weights that are evaluated and saved instead of those that train; None: the latter are."""
        return None

    def exchange(self, module: pl.LightningModule) -> None:
        """Exchange the contents of the weights that train and of those to evaluate, in place; twice changes nothing.

        The second set lies in the state of the wrapped optimiser, where ZeRO divides it and checkpoints hold it, and
        `swap.exchange_state(optimizer, key)` is all there is to do: the strategy carries what it did to the optimiser's
        parameters over to the module. Without a second set yet (before the first step), do nothing.
        """

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({arguments})"


def check_techniques(owner: str, techniques: Iterable[Technique]) -> tuple[Technique, ...]:
    """Return the techniques as a tuple.

    Raises:
        TypeError: If one of them is not a `Technique` instance, or one kind is given twice.
        InputError: If two of them name weights to evaluate, or one comes before another that it has to follow.
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
    names = [kind.__name__ for kind in kinds]
    for place, technique in enumerate(techniques):
        if late := next((name for name in names[place + 1 :] if name in technique.follows), None):
            raise InputError(f"{owner}(techniques=[...]): give {late} before {names[place]}, which looks at its steps.")
    own = [type(technique).__name__ for technique in techniques if technique.evaluates]
    if len(own) > 1:
        raise InputError(
            f"{owner}(techniques=[...]): {' and '.join(own)} each bring weights to evaluate, choose one: "
            "Lookahead(evaluate='fast') leaves it to the other."
        )
    return techniques
