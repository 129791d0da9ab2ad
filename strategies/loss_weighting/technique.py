"""Loss weighting as a technique: measure losses and gradients over all processes, weigh, back-propagate once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, count
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ...errors import InputError
from ..overrides import Override
from ..technique import Technique
from .gradients import cosines
from .rules import EPS, MAX_TASKS, RULES, Measurement
from .state import LossWeights

CHECK_EVERY = 50
Gradients = Literal["auto", "features", "parameters"]


@dataclass
class _Call:
    """One call of `task_losses`: its features and losses and, where they are taken at once, the gradients."""

    features: Tensor
    losses: Mapping[str, Tensor]
    gradients: list[Tensor] | None


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
            "priority".
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

    Raises:
        InputError: If a rule or value is not allowed.
    """

    def __init__(
        self,
        rule: str = "real_time",
        *,
        tasks: Sequence[str] | None = None,
        gradients: Gradients = "auto",
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
    ) -> None:
        if rule not in RULES:
            raise InputError(f"LossWeighting({rule!r}): no such rule; use one of {', '.join(RULES)}.")
        if gradients not in get_args(Gradients):
            raise InputError(f"LossWeighting(gradients={gradients!r}): use one of {', '.join(get_args(Gradients))}.")
        if every_n_steps < 1:
            raise InputError(f"LossWeighting(every_n_steps={every_n_steps}): use 1 or more.")
        if not 0 <= smoothing < 1:
            raise InputError(f"LossWeighting(smoothing={smoothing}): use a number from 0 to below 1.")
        self.rule = rule
        self.tasks = None if tasks is None else list(tasks)
        self.gradients: Gradients = gradients
        self.every_n_steps = every_n_steps
        self.smoothing = smoothing
        self.seed = seed
        options = {
            "weights": weights, "reference": reference, "reference_batches": reference_batches, "gamma": gamma,
            "temperature": temperature, "lr": lr, "clamp": clamp, "alpha": alpha, "c": c, "keep_length": keep_length,
            "main": main,
        }  # fmt: skip
        taken = inspect.signature(RULES[rule]).parameters
        given = {name: value for name, value in options.items() if value is not None}
        if unused := sorted(set(given) - set(taken)):
            rank_zero_warn(f"LossWeighting({rule!r}): {', '.join(unused)} has no effect on this rule.")
        self.options = {name: value for name, value in given.items() if name in taken}
        self._state = LossWeights(RULES[rule](**self.options))
        self._override: Override | None = None
        self._start()

    def _start(self) -> None:
        self._names: list[str] = []
        self._calls: list[_Call] = []
        self._shared: list[nn.Parameter] = []
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
        self._by_features = self.gradients == "features" or (self.gradients == "auto" and offers)
        # ZeRO stage 3 divides parameters and gathers those of the head for one backward pass after each forward pass.
        self._divided = getattr(getattr(module._trainer, "strategy", None), "stage", None) == 3
        self._state = LossWeights(RULES[self.rule](**self.options))
        if self._state.rule.uses_gradients:
            self._check_gradients(module, offers)
        if offers:
            self._override = Override(module, "task_losses", partial(self._record, module, module.task_losses))

    def detach(self, module: pl.LightningModule) -> None:
        override, self._override = self._override, None
        if override is not None:
            override.undo()

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule, "tasks": self._names, "values": self._state.values()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["rule"] != self.rule:
            rank_zero_warn(
                f"LossWeighting({self.rule!r}): the checkpoint was saved with rule={state['rule']!r}; "
                "this one starts anew."
            )
            return
        if self.tasks is not None and state["tasks"] and state["tasks"] != self.tasks:
            raise InputError(f"LossWeighting(tasks={self.tasks}): the checkpoint has {state['tasks']}; give these.")
        if state["tasks"]:
            self._bind(state["tasks"])
        self._state.load_state_dict(state["values"])

    def combine(self, outputs: Any, module: pl.LightningModule) -> Any:
        trainer = module._trainer
        calls, self._calls = self._calls, []
        if outputs is None:
            return None
        losses = _task_losses(outputs, calls, module)
        whole = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        with torch.autocast(whole.device.type, enabled=False):
            self._agree(losses, whole.device)
            self._batches += 1
            if trainer is not None and trainer.accumulate_grad_batches > 1:
                self._state.open_window()
            means, counts = self._means(losses)
            weights = self._weigh(means, counts, losses, calls, module)
            # Gradients are averaged over all processes, a loss over those that have the task.
            factors = torch.where(counts > 0, weights * _world() / counts, 0.0)
            # The module's own loss keeps in the graph what it keeps there, such as heads without a task in this batch.
            loss = 0.0 * whole.float()
            for index, name in enumerate(self._names):
                if name in losses:
                    loss = loss + factors[index].float() * losses[name].float()
        if trainer is not None and not trainer.fit_loop._should_accumulate():
            self._state.close_window()
        if not isinstance(outputs, Mapping):
            return loss
        return {**outputs, "loss": loss, "losses": {name: value.detach() for name, value in losses.items()}}

    # Measuring

    def _bind(self, names: list[str]) -> None:
        """Give the tasks their order."""
        if len(names) > MAX_TASKS:
            raise InputError(f"LossWeighting: {len(names)} tasks; use {MAX_TASKS} or fewer.")
        self._state.rule.bind(names)
        self._names = names

    def _agree(self, losses: Mapping[str, Tensor], device: torch.device) -> None:
        """Find the names of the tasks, and their order, the same on all processes; put the state on the device."""
        if self._state.weights.device != device:
            self._state.to(device)
        if not self._names:
            names = self.tasks or list(losses)
            if _world() > 1:
                gathered: list[Any] = [None] * _world()
                dist.all_gather_object(gathered, names)
                names = list(dict.fromkeys(name for own in gathered for name in own))
            self._bind(names)
        if unknown := [name for name in losses if name not in self._names]:
            raise InputError(
                f"LossWeighting: the task {unknown[0]!r} is not among {self._names}, which came first; "
                f"name all, tasks={self._names + unknown}."
            )

    def _means(self, losses: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean loss of each task over the processes that have it, and their number, both `(T,)`."""
        device = next(iter(losses.values())).device if losses else self._state.weights.device
        none = torch.zeros((), dtype=torch.float64, device=device)
        values = torch.stack([losses[name].detach().double() if name in losses else none for name in self._names])
        has = torch.tensor([name in losses for name in self._names], dtype=torch.float64, device=device)
        values, counts = _sum(torch.stack([values, has]))
        means = values / counts
        means = torch.where(means.isfinite(), means, torch.nan)
        if not self._state.rule.positive:
            return means, counts
        # Looking at a number waits for a GPU, so there it is done now and then.
        if (device.type == "cpu" or self._batches % CHECK_EVERY == 1) and bool((means < 0).any()):
            index = int((means < 0).int().argmax())
            raise InputError(
                f"LossWeighting({self.rule!r}): the loss of {self._names[index]!r} is {means[index]:.3g}, and this "
                "rule takes losses above 0 only; subtract their lower bound, or use rule='mgda'."
            )
        return means.clamp(min=EPS), counts

    def _weigh(
        self,
        means: Tensor,
        counts: Tensor,
        losses: Mapping[str, Tensor],
        calls: Sequence[_Call],
        module: pl.LightningModule,
    ) -> Tensor:
        """Return the weights `(T,)`, 0 for a task that is missing everywhere."""
        state, trainer, present = self._state, module._trainer, ~means.isnan()
        gram, smooth = means.new_empty(0), means
        if self.smoothing:
            smooth = torch.where(present, state.smooth("mean", means, present, self.smoothing), torch.nan)
        weights = state.weights[: len(means)].double()
        if not state.rule.uses_gradients or self._looks(module):
            if state.rule.uses_gradients:
                gram = self._gram(losses, counts, calls, module)
            # Only the lower 32 bits of a seed count.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._step(module)) % 2**32)
            with torch.no_grad():
                epoch = 0 if trainer is None else trainer.current_epoch
                weights = torch.where(present, state.rule.weigh(Measurement(smooth, gram, generator, epoch)), weights)
                state.weights[: len(means)] = weights
        self._log(means, weights, gram, module)
        return torch.where(present, weights, 0.0)

    def _step(self, module: pl.LightningModule) -> int:
        return self._batches if module._trainer is None else module._trainer.global_step

    def _looks(self, module: pl.LightningModule) -> bool:
        return self._step(module) % self.every_n_steps == 0

    def _log(self, means: Tensor, weights: Tensor, gram: Tensor, module: pl.LightningModule) -> None:
        trainer = module._trainer
        if trainer is None or not trainer._logger_connector.should_update_logs:
            return
        angles = cosines(gram) if len(gram) else gram
        present = [index for index, mean in enumerate(means.tolist()) if mean == mean]
        names = self._names
        values = {f"train/weight/{names[i]}": weights[i] for i in present}
        values |= {f"train/loss/{names[i]}": means[i] for i in present}
        if len(gram):
            values |= {f"train/cosine/{names[i]}_{names[j]}": angles[i, j] for i, j in combinations(present, 2)}
        module.log_dict({name: value.float() for name, value in values.items()})

    # Gradients

    def _check_gradients(self, module: pl.LightningModule, offers: bool) -> None:
        """Explain before training starts what will not work."""
        kind, trainer = type(module).__name__, module._trainer
        if self._by_features and not offers:
            raise InputError(
                f"LossWeighting({self.rule!r}, gradients='features'): {kind} has no task_losses(features, batch); "
                "add it, or use gradients='parameters'."
            )
        if not self._by_features and self._divided:
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

    def _record(
        self, module: pl.LightningModule, task_losses: Any, features: Any, *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """Stand for `task_losses`."""
        if not (module.training and torch.is_grad_enabled()):
            return task_losses(features, *args, **kwargs)

        def run(features: Tensor) -> Mapping[str, Tensor]:
            return task_losses(features, *args, **kwargs)

        gradients = None
        if self._divided and self._state.rule.uses_gradients and self._looks(module):
            gradients = self._cut(run, features)
        losses = run(features)
        self._calls.append(_Call(features, losses, gradients))
        return losses

    def _cut(self, run: Callable[[Tensor], Mapping[str, Tensor]], features: Tensor) -> list[Tensor]:
        """Return the gradient of each loss with respect to the features by a forward pass of the head for each task.

        The passes run on a detached copy, all with the random numbers that the pass to be trained on will draw.
        """
        gradients: list[Tensor] = []
        for index in count():
            with torch.random.fork_rng([features.device] if features.is_cuda else []):
                copy = features.detach().requires_grad_()
                losses = run(copy)
                self._agree(losses, features.device)
                # Also for a task that is missing here: every process gathers the head for every task.
                name = self._names[index]
                loss = losses[name] if name in losses else 0.0 * torch.stack(list(losses.values())).sum()
                gradients += torch.autograd.grad(loss, copy)
            if index + 1 == len(self._names):
                return gradients
        raise AssertionError

    def _gram(
        self, losses: Mapping[str, Tensor], counts: Tensor, calls: Sequence[_Call], module: pl.LightningModule
    ) -> Tensor:
        """Return the inner products `(T, T)` of the gradients of the losses of all processes together."""
        scale = torch.where(counts > 0, 1 / counts, 0.0)
        if self._by_features:
            rows = self._feature_gradients(losses, calls, module)
            gram = _sum((rows @ rows.T).double())
        else:
            rows = _sum(self._gradients(losses, self._find_shared(losses, module)))
            gram = (rows @ rows.T).double()
        gram = gram * scale * scale[:, None]
        if self._by_features and self._batches == 1:
            self._warn_of_disjoint(gram)
        if not self.smoothing:
            return gram
        present = gram.diagonal() > 0
        present = present & present[:, None]
        return torch.where(present, self._state.smooth("gram", gram, present, self.smoothing), 0.0)

    def _feature_gradients(
        self, losses: Mapping[str, Tensor], calls: Sequence[_Call], module: pl.LightningModule
    ) -> Tensor:
        if not calls:
            raise InputError(
                f"LossWeighting({self.rule!r}): the training_step of {type(module).__name__} does not call its "
                "task_losses(features, batch), whose features this rule looks at; call it there."
            )
        if not self._divided:
            return self._gradients(losses, [call.features for call in calls])
        if len(calls) > 1:
            raise InputError(
                f"LossWeighting({self.rule!r}): task_losses is called {len(calls)} times in a step, which ZeRO stage 3 "
                "allows once; give loss_weighting as the last technique."
            )
        assert calls[0].gradients is not None
        return torch.stack([gradient.flatten().float() for gradient in calls[0].gradients])

    def _gradients(self, losses: Mapping[str, Tensor], of: Sequence[Tensor]) -> Tensor:
        """Return the gradient of each loss as a row `(T, N)` of float32; a missing task has zeros."""
        rows = []
        for name in self._names:
            parts: Sequence[Tensor | None] = [None] * len(of)
            if name in losses:
                parts = torch.autograd.grad(losses[name], of, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(x) if part is None else part for x, part in zip(of, parts, strict=True)]
            rows.append(torch.cat([part.flatten().float() for part in flat]))
        return torch.stack(rows)

    def _find_shared(self, losses: Mapping[str, Tensor], module: pl.LightningModule) -> list[nn.Parameter]:
        """Return the parameters outside the head that at least two tasks reach, found with the first batch."""
        if self._shared:
            return self._shared
        head = getattr(module, "head", None)
        own = set(head.parameters()) if isinstance(head, nn.Module) else set()
        parameters = [p for p in module.parameters() if p.requires_grad and p not in own]
        reached = torch.zeros(len(parameters), device=self._state.weights.device)
        for name in self._names:
            here = torch.zeros_like(reached)
            if name in losses:
                parts = torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
                here = torch.tensor([float(part is not None) for part in parts], device=reached.device)
            reached += _sum(here) > 0
        enough = min(2, len(self._names))
        self._shared = [p for p, times in zip(parameters, reached.tolist(), strict=True) if times >= enough]
        if not self._shared:
            raise InputError(
                f"LossWeighting({self.rule!r}): no trained parameter of {type(module).__name__} outside its head is "
                "shared by two tasks; use a rule by losses, such as rule='real_time'."
            )
        return self._shared

    def _warn_of_disjoint(self, gram: Tensor) -> None:
        products = gram - gram.diagonal().diag()
        if int((gram.diagonal() > 0).sum()) > 1 and not bool(products.any()):
            rank_zero_warn(
                f"LossWeighting({self.rule!r}): no sample of the batch belongs to two tasks, so the gradients of the "
                "features are orthogonal and say nothing of conflicts; use gradients='parameters'."
            )


def _task_losses(outputs: Any, calls: Sequence[_Call], module: pl.LightningModule) -> dict[str, Tensor]:
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


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum(values: Tensor) -> Tensor:
    """Sum over all processes."""
    if _world() > 1:
        dist.all_reduce(values)
    return values
