"""Where the gradients of the losses are taken: at the features given to `task_losses`, or at shared parameters.

Both ways give the Gram matrix `(T, T)` of the sums of each loss's gradients over all processes.  Shapes: T tasks, N
numbers of all tensors together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ...errors import InputError
from ..overrides import Override
from . import processes

Head = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass
class Call:
    """One call of `task_losses`: its features and losses and, where they are taken at once, the gradients `(T, N)`."""

    features: Tensor
    losses: Mapping[str, Tensor]
    gradients: Tensor | None


class TaskCalls:
    """Notes what `task_losses` of a module is called with while it trains, and what it returns.

    Args:
        module: Whose calls.
        gradients: Takes the gradients inside the call, where they cannot be taken later.
    """

    def __init__(
        self, module: pl.LightningModule, gradients: Callable[[Head, Tensor], Tensor | None] | None = None
    ) -> None:
        self._calls: list[Call] = []
        self._gradients = gradients
        self._override = Override(module, "task_losses", partial(self._record, module, module.task_losses))

    def undo(self) -> None:
        """Leave the module alone."""
        self._override.undo()

    def take(self) -> list[Call]:
        """Return the calls since the last time."""
        calls, self._calls = self._calls, []
        return calls

    def _record(
        self, module: pl.LightningModule, task_losses: Any, features: Any, *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        if not (module.training and torch.is_grad_enabled()):
            return task_losses(features, *args, **kwargs)

        def run(features: Tensor) -> Mapping[str, Tensor]:
            return task_losses(features, *args, **kwargs)

        gradients = None if self._gradients is None else self._gradients(run, features)
        losses = run(features)
        self._calls.append(Call(features, losses, gradients))
        return losses


def cut_gradients(head: Head, features: Tensor, agree: Callable[[Mapping[str, Tensor]], Sequence[str]]) -> Tensor:
    """Return the gradient of each loss with respect to the features `(T, N)` by a forward pass of the head for each.

    The passes run on a detached copy, all with the random numbers that the pass to be trained on will draw.

    Args:
        head: Maps features to losses.
        features: Of the batch.
        agree: Maps the losses of this process to the names of all tasks.
    """
    rows: list[Tensor] = []
    while True:
        with torch.random.fork_rng([features.device] if features.is_cuda else []):
            copy = features.detach().requires_grad_()
            losses = head(copy)
            names = agree(losses)
            # Also for a task that is missing here: every process gathers the head for every task.
            name = names[len(rows)]
            loss = losses[name] if name in losses else 0.0 * torch.stack(list(losses.values())).sum()
            rows += torch.autograd.grad(loss, copy)
        if len(rows) == len(names):
            return torch.stack([row.flatten().float() for row in rows])


def gradient_rows(losses: Mapping[str, Tensor], tasks: Sequence[str], of: Sequence[Tensor]) -> Tensor:
    """Return the gradient of each loss as a row `(T, N)` of float32; a missing task has zeros."""
    rows = torch.zeros(len(tasks), sum(x.numel() for x in of), device=of[0].device)
    for row, name in zip(rows, tasks, strict=True):
        if name in losses:
            parts = torch.autograd.grad(losses[name], of, retain_graph=True, allow_unused=True)
            for space, part in zip(row.split([x.numel() for x in of]), parts, strict=True):
                if part is not None:
                    space.copy_(part.flatten())
    return rows


class Gradients(Protocol):
    """Where gradients are taken."""

    def gram(self, losses: Mapping[str, Tensor], tasks: Sequence[str], calls: Sequence[Call]) -> Tensor:
        """Return the inner products `(T, T)` in float64; 0 for a task that is missing from `losses` everywhere."""
        raise NotImplementedError


class AtFeatures:
    """At the features that `task_losses` was called with, on every base.

    Args:
        who: Begins messages.
        module: Whose features.
    """

    def __init__(self, who: str, module: pl.LightningModule) -> None:
        self.who, self.kind = who, type(module).__name__
        self._checked = False

    def gram(self, losses: Mapping[str, Tensor], tasks: Sequence[str], calls: Sequence[Call]) -> Tensor:
        """Return the inner products `(T, T)`."""
        if not calls:
            raise InputError(
                f"{self.who}: the training_step of {self.kind} does not call its task_losses(features, batch), whose "
                "features this rule looks at; call it there."
            )
        if not all(call.features.requires_grad for call in calls):
            raise InputError(
                f"{self.who}: nothing that is trained comes before the features that task_losses of {self.kind} is "
                "given, so they have no gradient; use a rule by losses, such as rule='real_time'."
            )
        rows = calls[0].gradients
        if rows is None:
            rows = gradient_rows(losses, tasks, [call.features for call in calls])
        elif len(calls) > 1:
            raise InputError(
                f"{self.who}: task_losses is called {len(calls)} times in a step, which ZeRO stage 3 allows once; "
                "give loss_weighting as the last technique."
            )
        gram = processes.total((rows @ rows.T).double())
        if not self._checked:
            self._checked = True
            self._warn_of_disjoint(gram)
        return gram

    def _warn_of_disjoint(self, gram: Tensor) -> None:
        products = gram - gram.diagonal().diag()
        if int((gram.diagonal() > 0).sum()) > 1 and not bool(products.any()):
            rank_zero_warn(
                f"{self.who}: no sample of the batch belongs to two tasks, so the gradients of the features are "
                "orthogonal and say nothing of conflicts; use gradients='parameters'."
            )


class AtParameters:
    """At the parameters outside the head that at least two tasks reach, found with the first batches of each task.

    Args:
        who: Begins messages.
        module: Whose parameters.
    """

    def __init__(self, who: str, module: pl.LightningModule) -> None:
        self.who, self.module = who, module
        # By task and parameter, on any process so far; in the last column, whether there was such a task at all.
        self._reached: Tensor | None = None
        self._shared: list[nn.Parameter] = []

    def gram(self, losses: Mapping[str, Tensor], tasks: Sequence[str], calls: Sequence[Call]) -> Tensor:
        """Return the inner products `(T, T)`; 0 as long as no parameter is known to be shared."""
        if self._reached is None or not bool(self._reached[:, -1].all()):
            self._reached = self._look(losses, tasks)
        if not self._shared:
            return torch.zeros(len(tasks), len(tasks), dtype=torch.float64, device=self._reached.device)
        rows = processes.total(gradient_rows(losses, tasks, self._shared))
        return (rows @ rows.T).double()

    def _look(self, losses: Mapping[str, Tensor], tasks: Sequence[str]) -> Tensor:
        """Note what each task of this batch reaches; all processes know the same afterwards."""
        head = getattr(self.module, "head", None)
        own = set(head.parameters()) if isinstance(head, nn.Module) else set()
        parameters = [p for p in self.module.parameters() if p.requires_grad and p not in own]
        reached = torch.zeros(len(tasks), len(parameters) + 1, device=parameters[0].device if parameters else None)
        for row, name in zip(reached, tasks, strict=True):
            if name in losses and parameters:
                parts = torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
                row.copy_(torch.tensor([*(float(part is not None) for part in parts), 1.0]))
        found = processes.total(reached) > 0
        found = found if self._reached is None else self._reached | found
        times = found[:, :-1].sum(0).tolist()
        self._shared = [p for p, count in zip(parameters, times, strict=True) if count >= min(2, len(tasks))]
        if not self._shared and (not parameters or bool(found[:, -1].all())):
            raise InputError(
                f"{self.who}: no trained parameter of {type(self.module).__name__} outside its head is shared by two "
                "tasks; use a rule by losses, such as rule='real_time'."
            )
        return found
