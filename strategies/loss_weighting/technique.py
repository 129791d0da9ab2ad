"""Loss weighting as a technique: measure losses and gradients over all processes, weigh, back-propagate once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import combinations
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from ...errors import InputError
from ..second_pass import SecondPass
from ..technique import Technique
from . import processes
from .gradients import cosines
from .measuring import AtFeatures, AtParameters, Call, Gradients, Head, TaskCalls, cut_gradients
from .rules import EPS, RULES, Measurement
from .state import LossWeights

CHECK_EVERY = 50
ROUNDING = 1e-4
"""So far below 0 may be a loss that is 0: one of float32 from which a lower bound of the same size was taken."""
Where = Literal["auto", "features", "parameters"]


class LossWeighting(Technique):
    """Weigh the losses of several tasks by a rule. Card: docs/cards/loss_weighting.md.

    The module returns `{"loss": ..., "losses": {name: scalar}}` from `training_step`, or calls `task_losses(features,
    batch)` in it. The sum of weight times loss takes the place of its loss. Weights come from losses (and gradients)
    averaged over all processes, so they are equal on all of them and those of one process on the union of the batches.

    A task that a batch holds nothing of is left out of `losses` (the module's own `loss` should keep its head in the
    graph, as DDP asks anyway). It gets no weight; on the processes that have it, it counts as if they were all.

    Args:
        rule: By losses: "fixed", "initial", "prior", "real_time", "geometric_mean", "generalised_mean", "uncertainty",
            "imtl_l", "dwa", "random". By gradients: "gradient_norm", "mgda", "pcgrad", "cagrad", "imtl_g", "gradnorm",
            "priority", "torchjd".
        tasks: Names of all tasks; None: those that the processes find in their first batch.
        gradients: Where rules look at gradients: "features", what is given to `task_losses` (every base; one backward
            pass of the head per task); "parameters", those that several tasks share (not under ZeRO stage 3; one
            backward pass of everything per task); "auto", the first where the module has `task_losses`.
        every_n_steps: Steps between two looks at the gradients; the weights stay in between.
        smoothing: Share of the past in running means of losses and inner products, from 0 to below 1.
        seed: Of random weights and orders, with the step.
        weights: fixed: weight of each task.
        reference: initial, prior: loss of each task at the start, or of its best constant prediction.
        reference_batches: initial: batches over which the loss at the start is measured if it is not given.
        gamma: generalised_mean: the exponent.
        temperature: dwa: the larger, the more equal.
        lr: uncertainty, imtl_l, gradnorm: learning rate of the scores.
        clamp: uncertainty, imtl_l, gradnorm: largest absolute score.
        alpha: gradnorm: how much more gradient a slower task gets.
        c: cagrad: distance from the mean gradient, relative to its norm.
        keep_length: gradient_norm: multiply by the mean norm.
        main: priority: the main task or tasks.
        aggregator: torchjd: name of one of its aggregators that look at the Gram matrix alone.
        aggregator_options: torchjd: what its constructor takes.

    Raises:
        InputError: If a rule or value is not allowed.
    """

    def __init__(
        self,
        rule: str = "real_time",
        *,
        tasks: Sequence[str] | None = None,
        gradients: Where = "auto",
        every_n_steps: int = 1,
        smoothing: float = 0.0,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        reference: Mapping[str, float] | None = None,
        reference_batches: int | None = None,
        gamma: float | None = None,
        temperature: float | None = None,
        lr: float | None = None,
        clamp: float | None = None,
        alpha: float | None = None,
        c: float | None = None,
        keep_length: bool | None = None,
        main: str | Sequence[str] | None = None,
        aggregator: str | None = None,
        aggregator_options: Mapping[str, float | str] | None = None,
    ) -> None:
        if rule not in RULES:
            raise InputError(f"LossWeighting({rule!r}): no such rule; use one of {', '.join(RULES)}.")
        if gradients not in get_args(Where):
            raise InputError(f"LossWeighting(gradients={gradients!r}): use one of {', '.join(get_args(Where))}.")
        if every_n_steps < 1:
            raise InputError(f"LossWeighting(every_n_steps={every_n_steps}): use 1 or more.")
        if not 0 <= smoothing < 1:
            raise InputError(f"LossWeighting(smoothing={smoothing}): use a number from 0 to below 1.")
        self.rule = rule
        self.tasks = None if tasks is None else list(tasks)
        self.gradients: Where = gradients
        self.every_n_steps = every_n_steps
        self.smoothing = smoothing
        self.seed = seed
        options = {
            "weights": weights, "reference": reference, "reference_batches": reference_batches, "gamma": gamma,
            "temperature": temperature, "lr": lr, "clamp": clamp, "alpha": alpha, "c": c, "keep_length": keep_length,
            "main": main, "aggregator": aggregator, "aggregator_options": aggregator_options,
        }  # fmt: skip
        taken = inspect.signature(RULES[rule]).parameters
        given = {name: value for name, value in options.items() if value is not None}
        if unused := sorted(set(given) - set(taken)):
            rank_zero_warn(f"LossWeighting({rule!r}): {', '.join(unused)} has no effect on this rule.")
        self.options = {name: value for name, value in given.items() if name in taken}
        self._start()

    def _start(self) -> None:
        self._state = LossWeights(RULES[self.rule](**self.options), self.smoothing)
        self._calls: TaskCalls | None = None
        self._source: Gradients | None = None
        self._batches = 0

    # Touch points

    def attach(self, module: pl.LightningModule) -> None:
        kind = type(module).__name__
        if not module.automatic_optimization:
            raise InputError(
                f"LossWeighting: {kind} back-propagates inside training_step, before its losses could be weighed; "
                "use automatic_optimization=True."
            )
        self._start()
        offers = callable(getattr(module, "task_losses", None))
        cut = None
        if self._state.rule.uses_gradients:
            by_features = self.gradients == "features" or (self.gradients == "auto" and offers)
            # ZeRO stage 3 divides parameters, and gathers those of the head for one backward pass after a forward pass.
            divided = getattr(getattr(module._trainer, "strategy", None), "stage", None) == 3
            self._check_gradients(module, by_features, offers, divided)
            who = f"LossWeighting({self.rule!r})"
            self._source = AtFeatures(who, module) if by_features else AtParameters(who, module)
            cut = partial(self._cut, module) if divided else None
        if offers:
            self._calls = TaskCalls(module, cut)

    def detach(self, module: pl.LightningModule) -> None:
        calls, self._calls = self._calls, None
        if calls is not None:
            calls.undo()

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule, "tasks": self._state.tasks, "values": self._state.values()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        rule, tasks = state["rule"], list(state["tasks"])
        if rule != self.rule:
            rank_zero_warn(
                f"LossWeighting({self.rule!r}): the checkpoint was saved with rule={rule!r}; this one starts anew."
            )
        elif tasks:
            if self.tasks is not None and sorted(self.tasks) != sorted(tasks):
                raise InputError(f"LossWeighting(tasks={self.tasks}): the checkpoint has {tasks}; give these.")
            self._state.bind(tasks)
            self._state.load_values(state["values"])

    def combine(self, outputs: Any, module: pl.LightningModule) -> Any:
        calls = [] if self._calls is None else self._calls.take()
        if outputs is None:
            return None
        losses = _task_losses(outputs, calls, module)
        whole = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        mixed = torch.is_autocast_enabled(whole.device.type)
        with torch.autocast(whole.device.type, enabled=False) if mixed else nullcontext():
            loss = self._combine(losses, whole, calls, module)
        if not isinstance(outputs, Mapping):
            return loss
        return {**outputs, "loss": loss, "losses": {name: value.detach() for name, value in losses.items()}}

    def _combine(
        self, losses: Mapping[str, Tensor], whole: Tensor, calls: Sequence[Call], module: pl.LightningModule
    ) -> Tensor:
        trainer, state = module._trainer, self._state
        tasks = self._agree(losses, whole.device)
        self._batches += 1
        if trainer is not None and trainer.accumulate_grad_batches > 1:
            state.open_window()
        own = [index for index, name in enumerate(tasks) if name in losses]
        values = torch.stack([losses[tasks[index]].float() for index in own]) if own else whole.new_empty(0).float()
        means, counts = self._means(values.detach(), own)
        weights = self._weigh(means, counts, losses, calls, module)
        # Gradients are averaged over all processes, a loss over those that have the task.
        factors = weights if counts is None else torch.where(counts > 0, weights * (processes.world() / counts), 0.0)
        if len(own) < len(tasks):
            factors = factors[own]
        # The module's own loss keeps in the graph what it keeps there, such as heads without a task in this batch.
        loss = torch.add(torch.dot(factors.float(), values), whole.float(), alpha=0)
        if trainer is not None and not trainer.fit_loop._should_accumulate():
            state.close_window()
        return loss

    # Losses

    def _agree(self, losses: Mapping[str, Tensor], device: torch.device) -> list[str]:
        """Return the names of the tasks in their order, the same on all processes; put the state on the device."""
        state = self._state
        if not state.tasks:
            state.bind(processes.union(self.tasks or list(losses)))
        if state.weights.device != device:
            state.to(device)
        if unknown := [name for name in losses if name not in state.tasks]:
            raise InputError(
                f"LossWeighting: the task {unknown[0]!r} is not among {state.tasks}, which came first; "
                f"name all, tasks={state.tasks + unknown}."
            )
        return state.tasks

    def _means(self, values: Tensor, own: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss of each task over the processes that have it, and their number, both `(T,)`.

        A task that is missing everywhere, or whose loss is not finite, has NaN. No number: one process has all tasks.

        Args:
            values: This process' losses.
            own: The tasks that they belong to.
        """
        tasks, counts = self._state.tasks, None
        means = values.double()
        if len(own) < len(tasks) or processes.world() > 1:
            sums = torch.stack([means, torch.ones_like(means)])
            if len(own) < len(tasks):
                index = torch.tensor(own, dtype=torch.long, device=means.device)
                sums = sums.new_zeros(2, len(tasks)).index_copy_(1, index, sums)
            total, counts = processes.total(sums)
            means = total / counts
        means = means.nan_to_num(nan=torch.nan, posinf=torch.nan, neginf=torch.nan)
        if not self._state.rule.positive:
            return means, counts
        # Looking at a number waits for a GPU, so there it is done now and then.
        negative = means < -ROUNDING
        if (means.device.type == "cpu" or self._batches % CHECK_EVERY == 1) and bool(negative.any()):
            at = int(negative.int().argmax())
            raise InputError(
                f"LossWeighting({self.rule!r}): the loss of {tasks[at]!r} is {means[at]:.3g}, and this rule takes "
                "losses above 0 only; subtract their lower bound, or use rule='mgda'."
            )
        return means.clamp(min=EPS), counts

    def _weigh(
        self,
        means: Tensor,
        counts: Tensor | None,
        losses: Mapping[str, Tensor],
        calls: Sequence[Call],
        module: pl.LightningModule,
    ) -> Tensor:
        """Return the weights `(T,)`, 0 for a task that is missing everywhere."""
        state, trainer, gram, seen = self._state, module._trainer, None, means
        present = means == means
        if state.means is not None:
            seen = torch.where(present, state.means(means, present), torch.nan)
        if not state.rule.uses_gradients or self._looks(module):
            if self._source is not None:
                gram = self._gram(self._source, counts, losses, calls)
            # Only the lower 32 bits of a seed count.
            seed = (self.seed * 1_000_003 + self._step(module)) % 2**32
            epoch = 0 if trainer is None else trainer.current_epoch
            new = state.rule.weigh(Measurement(seen, gram, seed, epoch))
            state.weights.copy_(torch.where(present, new, state.weights))
        self._log(means, gram, module)
        return torch.where(present, state.weights, 0.0)

    def _step(self, module: pl.LightningModule) -> int:
        return self._batches if module._trainer is None else module._trainer.global_step

    def _log(self, means: Tensor, gram: Tensor | None, module: pl.LightningModule) -> None:
        trainer, weights, tasks = module._trainer, self._state.weights, self._state.tasks
        if trainer is None or not trainer._logger_connector.should_update_logs:
            return
        present = [index for index, mean in enumerate(means.tolist()) if mean == mean]
        values = {f"train/weight/{tasks[i]}": weights[i] for i in present}
        values |= {f"train/loss/{tasks[i]}": means[i] for i in present}
        if gram is not None:
            angles = cosines(gram)
            values |= {f"train/cosine/{tasks[i]}_{tasks[j]}": angles[i, j] for i, j in combinations(present, 2)}
        module.log_dict({name: value.float() for name, value in values.items()})

    # Gradients

    def _check_gradients(self, module: pl.LightningModule, by_features: bool, offers: bool, divided: bool) -> None:
        """Explain before training starts what will not work."""
        kind, trainer = type(module).__name__, module._trainer
        if by_features and not offers:
            raise InputError(
                f"LossWeighting({self.rule!r}, gradients='features'): {kind} has no task_losses(features, batch); "
                "add it, or use gradients='parameters'."
            )
        others = () if trainer is None else getattr(trainer.strategy, "techniques", ())
        twice = next((type(other).__name__ for other in others if isinstance(other, SecondPass)), None)
        if divided and twice is not None:
            raise InputError(
                f"LossWeighting({self.rule!r}): {twice} runs the training step more than once, and ZeRO stage 3 "
                "gathers the head, at which this rule looks, for one pass only; use strategy=zero_2, or a rule by "
                "losses, such as rule='real_time'."
            )
        if not by_features and divided:
            hint = "use gradients='features'" if offers else f"add task_losses(features, batch) to {kind}"
            raise InputError(
                f"LossWeighting({self.rule!r}): ZeRO stage 3 divides the parameters, whose gradients this rule looks "
                f"at; {hint}, or strategy=zero_2, or a rule by losses, such as rule='real_time'."
            )
        if trainer is not None and str(trainer.precision).startswith("16"):
            raise InputError(
                f"LossWeighting({self.rule!r}): gradients of unscaled losses vanish in float16; "
                "use trainer.precision=bf16-mixed, or a rule by losses."
            )

    def _looks(self, module: pl.LightningModule) -> bool:
        return self._step(module) % self.every_n_steps == 0

    def _cut(self, module: pl.LightningModule, head: Head, features: Tensor) -> Tensor | None:
        """Take the gradients inside a call of `task_losses`."""
        if not self._looks(module):
            return None
        return cut_gradients(head, features, partial(self._agree, device=features.device))

    def _gram(
        self, source: Gradients, counts: Tensor | None, losses: Mapping[str, Tensor], calls: Sequence[Call]
    ) -> Tensor:
        """Return the inner products `(T, T)` of the gradients of the losses of all processes together."""
        gram = source.gram(losses, self._state.tasks, calls)
        if counts is not None:
            scale = torch.where(counts > 0, 1 / counts, 0.0)
            gram = gram * scale * scale[:, None]
        if self._state.gram is None:
            return gram
        present = gram.diagonal() > 0
        present = present & present[:, None]
        return torch.where(present, self._state.gram(gram, present), 0.0)


def _task_losses(outputs: Any, calls: Sequence[Call], module: pl.LightningModule) -> dict[str, Tensor]:
    """Return the losses of a step by task, those that are there."""
    if isinstance(outputs, Mapping) and "losses" in outputs:
        losses = outputs["losses"]
    elif len(calls) == 1:
        losses = calls[0].losses
    else:
        raise InputError(
            f"LossWeighting: the training_step of {type(module).__name__} tells no losses; "
            'return {"loss": loss, "losses": {"NAME": tensor, ...}}.'
        )
    for name, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.ndim:
            what = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
            raise InputError(f"LossWeighting: the loss of {name!r} is {what}; return one number a task, as a tensor.")
    return dict(losses)
