"""The rules as small modules: what each keeps between steps lies in buffers, so that checkpoints hold it.

A rule maps a `Measurement`, equal on all processes, to weights `(T,)`. Learned scores are buffers too, moved by an Adam
of their own: their gradient depends on the mean losses alone, so they need no group in the model's optimiser, know no
weight decay, and are the same on every base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import InputError
from . import gradients, losses

MAX_TASKS = 16
EPS = 1e-8
"""Stands for losses nearer to 0."""


@dataclass(frozen=True)
class Measurement:
    """What a rule may look at.

    Attributes:
        losses: Mean losses over all processes `(T,)` in float64; NaN where a task is missing from the batch.
        gram: Inner products of the gradients `(T, T)` in float64; empty for rules that do not ask for them.
        generator: On the CPU, seeded by the run's seed and the step.
        epoch: The current one.
    """

    losses: Tensor
    gram: Tensor
    generator: torch.Generator
    epoch: int


class Rule(nn.Module):
    """A way to weigh losses."""

    uses_gradients = False
    positive = False
    """Whether it takes losses above 0 only."""

    def bind(self, tasks: Sequence[str]) -> None:
        """Learn the names of the tasks, in the order of all vectors."""

    def weigh(self, now: Measurement) -> Tensor:
        """Return the weights `(T,)`; what a missing task gets is of no importance."""
        raise NotImplementedError

    def _keep(self, *names: str, value: float = 0.0) -> None:
        for name in names:
            self.register_buffer(name, torch.full((MAX_TASKS,), value))


# By the losses


class Fixed(Rule):
    """The same weights throughout, 1 by default."""

    values: Tensor

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = weights
        self._keep("values", value=1.0)

    def bind(self, tasks: Sequence[str]) -> None:
        if self.weights is not None:
            _fill(self.values, self.weights, tasks, "fixed", "weights")

    def weigh(self, now: Measurement) -> Tensor:
        return self.values[: len(now.losses)].double()


class Initial(Rule):
    """1 / loss at the start, given by `reference` or measured over the first batches."""

    positive = True
    total: Tensor
    count: Tensor

    def __init__(self, reference: Mapping[str, float] | None = None, reference_batches: int = 8) -> None:
        super().__init__()
        self.reference = reference
        self.reference_batches = reference_batches
        self._keep("total", "count")

    def bind(self, tasks: Sequence[str]) -> None:
        if self.reference is not None:
            _fill(self.total, self.reference, tasks, type(self).__name__.lower(), "reference")
            self.count[: len(tasks)] = self.reference_batches

    def measure(self, now: Measurement) -> Tensor:
        """Count the batch if it is one of the first; return the mean of those counted, NaN for a task not yet seen."""
        n = len(now.losses)
        counts = ~now.losses.isnan() & (self.count[:n] < self.reference_batches)
        self.total[:n] += torch.where(counts, now.losses, 0.0)
        self.count[:n] += counts
        # A given reference stands in `total` as it is.
        mean = self.total[:n].double() / (1.0 if self.reference is not None else self.count[:n])
        return torch.where(self.count[:n] > 0, mean, torch.nan)

    def weigh(self, now: Measurement) -> Tensor:
        return losses.inverse_weights(self.measure(now))


class Prior(Initial):
    """1 / loss of the best constant prediction."""

    positive = False

    def __init__(self, reference: Mapping[str, float] | None = None) -> None:
        if reference is None:
            raise InputError(
                "LossWeighting('prior'): give the loss of the best constant prediction of each task, such as "
                "reference={'digit': 2.303, 'parity': 0.693}."
            )
        super().__init__(reference)


class RealTime(Rule):
    """1 / current loss."""

    positive = True

    def weigh(self, now: Measurement) -> Tensor:
        return losses.inverse_weights(now.losses)


class GeneralisedMean(Rule):
    """Weights of the generalised mean."""

    positive = True

    def __init__(self, gamma: float = 0.5) -> None:
        super().__init__()
        self.gamma = gamma

    def weigh(self, now: Measurement) -> Tensor:
        return losses.generalised_mean_weights(now.losses, self.gamma)


class GeometricMean(GeneralisedMean):
    """Weights of the geometric mean: those of `RealTime` times the mean over T."""

    def __init__(self) -> None:
        super().__init__(0.0)


class DynamicWeightAverage(Rule):
    """DWA: equal for two epochs, then by the ratio of the mean losses of the last two."""

    positive = True
    total: Tensor
    count: Tensor
    last: Tensor
    before_last: Tensor
    epoch: Tensor

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise InputError(f"LossWeighting('dwa', temperature={temperature}): use a number above 0.")
        self.temperature = temperature
        self._keep("total", "count")
        self._keep("last", "before_last", value=torch.nan)
        self.register_buffer("epoch", torch.tensor(-1))
        self._epoch: int | None = None  # the buffer's value, read once: reading it waits for the device

    def weigh(self, now: Measurement) -> Tensor:
        n = len(now.losses)
        if self._epoch is None:
            self._epoch = int(self.epoch)
        if self._epoch != now.epoch:
            self.before_last.copy_(self.last)
            self.last.copy_(self.total / self.count)
            self.total.zero_()
            self.count.zero_()
            self.epoch.fill_(now.epoch)
            self._epoch = now.epoch
        present = ~now.losses.isnan()
        self.total[:n] += torch.where(present, now.losses, 0.0)
        self.count[:n] += present
        last, before_last = self.last[:n].double(), self.before_last[:n].double()
        unknown = (last / before_last).isnan()
        one = torch.ones_like(last)
        return losses.dynamic_weight_average(
            torch.where(unknown, one, last), torch.where(unknown, one, before_last), self.temperature
        )


class Random(Rule):
    """RLW: drawn anew for every step, the same on all processes."""

    def weigh(self, now: Measurement) -> Tensor:
        return losses.random_weights(len(now.losses), now.generator).to(now.losses.device)


class Learned(Rule):
    """Weights by scores s that gradient descent moves."""

    s: Tensor
    first: Tensor
    second: Tensor
    steps: Tensor

    def __init__(self, lr: float = 0.05, clamp: float = 10.0) -> None:
        super().__init__()
        if lr <= 0 or clamp <= 0:
            raise InputError(f"LossWeighting(lr={lr}, clamp={clamp}): use numbers above 0.")
        self.lr = lr
        self.clamp = clamp
        self._keep("s", "first", "second", "steps")

    def move(self, objective: Callable[[Tensor], Tensor], present: Tensor) -> None:
        """Take an Adam step down the objective of s; a missing task stays where it is."""
        n = len(present)
        with torch.enable_grad():
            s = self.s[:n].double().requires_grad_()
            slope = torch.autograd.grad(objective(s), s)[0]
        # A short memory: slopes are exponential in s, and beside the first ones all later ones would look like nothing.
        first, second = 0.9 * self.first[:n] + 0.1 * slope, 0.9 * self.second[:n] + 0.1 * slope**2
        steps = self.steps[:n] + 1
        correction = 1 - 0.9**steps
        length = (second / correction).sqrt() + 1e-8
        moved = (s.detach() - self.lr * first / correction / length).clamp(-self.clamp, self.clamp)
        for buffer, value in ((self.s, moved), (self.first, first), (self.second, second), (self.steps, steps)):
            buffer[:n] = torch.where(present, value, buffer[:n].double())


class Uncertainty(Learned):
    """exp(-s) / 2, where s are log variances."""

    positive = True

    def weigh(self, now: Measurement) -> Tensor:
        present = ~now.losses.isnan()
        weights = torch.exp(-self.s[: len(present)].double()) / 2
        self.move(lambda s: losses.uncertainty(now.losses.nan_to_num(nan=1.0), s), present)
        return weights


class ImtlL(Learned):
    """exp(s), where s are log scales."""

    positive = True

    def weigh(self, now: Measurement) -> Tensor:
        present = ~now.losses.isnan()
        weights = torch.exp(self.s[: len(present)].double())
        self.move(lambda s: losses.imtl_l(now.losses.nan_to_num(nan=1.0), s), present)
        return weights


# By the gradients


class GradientNorm(Rule):
    """1 / norm of the gradient."""

    uses_gradients = True

    def __init__(self, keep_length: bool = False) -> None:
        super().__init__()
        self.keep_length = keep_length

    def weigh(self, now: Measurement) -> Tensor:
        return gradients.gradient_norm_weights(now.gram, self.keep_length)


class Mgda(Rule):
    """The shortest convex combination."""

    uses_gradients = True

    def weigh(self, now: Measurement) -> Tensor:
        return gradients.min_norm_weights(now.gram)


class PcGrad(Rule):
    """Projections in random order, the same on all processes."""

    uses_gradients = True

    def weigh(self, now: Measurement) -> Tensor:
        return gradients.pcgrad_weights(now.gram, now.generator)


class CaGrad(Rule):
    """Best for the worst task, near the mean gradient."""

    uses_gradients = True

    def __init__(self, c: float = 0.4) -> None:
        super().__init__()
        if c < 0:
            raise InputError(f"LossWeighting('cagrad', c={c}): use 0 or more.")
        self.c = c

    def weigh(self, now: Measurement) -> Tensor:
        return gradients.cagrad_weights(now.gram, self.c)


class ImtlG(Rule):
    """Equal projections."""

    uses_gradients = True

    def weigh(self, now: Measurement) -> Tensor:
        return gradients.imtl_g_weights(now.gram)


class GradNorm(Learned):
    """Learned weights that sum to T, so that slower tasks get larger gradients."""

    uses_gradients = True
    positive = True

    def __init__(self, lr: float = 0.05, clamp: float = 10.0, alpha: float = 1.5) -> None:
        super().__init__(lr, clamp)
        self.alpha = alpha
        self.initial = Initial(reference_batches=1)

    def weigh(self, now: Measurement) -> Tensor:
        present = ~now.losses.isnan()
        n = len(present)
        weights = n * self.s[:n].double().softmax(0)
        rates = torch.where(present, now.losses / self.initial.measure(now), 1.0)
        norms = now.gram.diagonal().sqrt()
        self.move(lambda s: gradients.gradnorm(s, norms, rates, self.alpha), present)
        return weights


class Priority(Rule):
    """Lower the main tasks as far as no auxiliary rises."""

    uses_gradients = True

    def __init__(self, main: str | Sequence[str] | None = None) -> None:
        super().__init__()
        self.main = [main] if isinstance(main, str) else list(main or ())
        if not self.main:
            raise InputError("LossWeighting('priority'): name the main task or tasks, such as main='digit'.")

    def bind(self, tasks: Sequence[str]) -> None:
        if unknown := [name for name in self.main if name not in tasks]:
            raise InputError(f"LossWeighting('priority', main={unknown[0]!r}): no such task; use {_list(tasks)}.")
        self.indices = [tasks.index(name) for name in self.main]

    def weigh(self, now: Measurement) -> Tensor:
        return gradients.priority_weights(now.gram, self.indices)


RULES: dict[str, type[Rule]] = {
    "fixed": Fixed,
    "initial": Initial,
    "prior": Prior,
    "real_time": RealTime,
    "geometric_mean": GeometricMean,
    "generalised_mean": GeneralisedMean,
    "uncertainty": Uncertainty,
    "imtl_l": ImtlL,
    "dwa": DynamicWeightAverage,
    "random": Random,
    "gradient_norm": GradientNorm,
    "mgda": Mgda,
    "pcgrad": PcGrad,
    "cagrad": CaGrad,
    "imtl_g": ImtlG,
    "gradnorm": GradNorm,
    "priority": Priority,
}


def _fill(values: Tensor, given: Mapping[str, float], tasks: Sequence[str], rule: str, option: str) -> None:
    if set(given) != set(tasks):
        raise InputError(f"LossWeighting({rule!r}, {option}={dict(given)}): give a number for each of {_list(tasks)}.")
    if rule != "fixed" and min(given.values()) <= 0:
        raise InputError(f"LossWeighting({rule!r}, {option}={dict(given)}): use losses above 0.")
    values[: len(tasks)] = torch.tensor([float(given[name]) for name in tasks])


def _list(tasks: Sequence[str]) -> str:
    return ", ".join(tasks)
