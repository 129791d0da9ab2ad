"""The rules as small modules: what each keeps between steps lies in buffers, so that checkpoints hold it.

A rule maps a `Measurement`, equal on all processes, to weights `(T,)`. It has its buffers, `(T,)` in float64, once it
is bound to the tasks; numbers given as options lie in buffers that checkpoints leave out. Learned scores are buffers
too, moved by an Adam of their own: their gradient depends on the mean losses alone, so they need no group in the
model's optimiser, know no weight decay, and are the same on every base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from . import gradients, losses

EPS = 1e-8
"""Stands for losses nearer to 0."""


@dataclass(frozen=True)
class Measurement:
    """What a rule may look at.

    Attributes:
        losses: Mean losses over all processes `(T,)` in float64; NaN where a task is missing from the batch.
        gram: Inner products of the gradients `(T, T)` in float64; None for rules that do not ask for them.
        seed: Of random choices, made of the run's seed and the step.
        epoch: The current one.
    """

    losses: Tensor
    gram: Tensor | None = None
    seed: int = 0
    epoch: int = 0

    @property
    def present(self) -> Tensor:
        """Which tasks are in the batch `(T,)`."""
        return self.losses == self.losses  # NaN is not

    def generator(self) -> torch.Generator:
        """Return a generator on the CPU, the same on all processes."""
        return torch.Generator().manual_seed(self.seed)


class Rule(nn.Module):
    """A way to weigh losses."""

    uses_gradients = False
    positive = False
    """Whether it takes losses above 0 only."""

    def bind(self, tasks: Sequence[str]) -> None:
        """Learn the names of the tasks, in the order of all vectors; make the buffers, as before the first batch."""

    def weigh(self, now: Measurement) -> Tensor:
        """Return the weights `(T,)`; what a missing task gets is of no importance."""
        raise NotImplementedError

    def _keep(self, tasks: Sequence[str], *names: str, value: float = 0.0) -> None:
        for name in names:
            self.register_buffer(name, torch.full((len(tasks),), value, dtype=torch.float64))

    def _give(self, name: str, values: Mapping[str, float], tasks: Sequence[str], option: str) -> None:
        """Make a buffer of an option's value for each task, which no checkpoint holds."""
        if set(values) != set(tasks):
            raise InputError(f"LossWeighting({option}={dict(values)}): give a number for each of {', '.join(tasks)}.")
        given = torch.tensor([float(values[task]) for task in tasks], dtype=torch.float64)
        self.register_buffer(name, given, persistent=False)


# By the losses


class Fixed(Rule):
    """The same weights throughout, 1 by default."""

    values: Tensor

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = weights

    def bind(self, tasks: Sequence[str]) -> None:
        self._give("values", dict.fromkeys(tasks, 1.0) if self.weights is None else self.weights, tasks, "weights")

    def weigh(self, now: Measurement) -> Tensor:
        return self.values


class Initial(Rule):
    """1 / loss at the start, given by `reference` or measured over the first batches."""

    known: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, reference: Mapping[str, float] | None = None, reference_batches: int = 8) -> None:
        super().__init__()
        if reference is not None and min(reference.values(), default=1.0) <= 0:
            raise InputError(f"LossWeighting(reference={dict(reference)}): use losses above 0.")
        self.reference = reference
        self.reference_batches = reference_batches
        self.positive = reference is None

    def bind(self, tasks: Sequence[str]) -> None:
        if self.reference is not None:
            self._give("known", self.reference, tasks, "reference")
        else:
            self._keep(tasks, "total", "count")

    def measure(self, now: Measurement) -> Tensor:
        """Count the batch if it is one of the first; return the mean of those counted, NaN for a task not yet seen."""
        counts = now.present & (self.count < self.reference_batches)
        self.total += torch.where(counts, now.losses, 0.0)
        self.count += counts
        return self.total / self.count

    def weigh(self, now: Measurement) -> Tensor:
        return losses.inverse_weights(self.measure(now) if self.reference is None else self.known)


class Prior(Initial):
    """1 / loss of the best constant prediction."""

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

    def bind(self, tasks: Sequence[str]) -> None:
        self._keep(tasks, "total", "count")
        self._keep(tasks, "last", "before_last", value=torch.nan)
        self.register_buffer("epoch", torch.tensor(-1))
        self._epoch: int | None = None  # the buffer's value, read once: reading it waits for the device

    def weigh(self, now: Measurement) -> Tensor:
        if self._epoch is None:
            self._epoch = int(self.epoch)
        if self._epoch != now.epoch:
            self.before_last.copy_(self.last)
            self.last.copy_(self.total / self.count)
            self.total.zero_()
            self.count.zero_()
            self.epoch.fill_(now.epoch)
            self._epoch = now.epoch
        present = now.present
        self.total += torch.where(present, now.losses, 0.0)
        self.count += present
        unknown = (self.last / self.before_last).isnan()
        last, before_last = (torch.where(unknown, 1.0, mean) for mean in (self.last, self.before_last))
        return losses.dynamic_weight_average(last, before_last, self.temperature)


class Random(Rule):
    """RLW: drawn anew for every step, the same on all processes."""

    def weigh(self, now: Measurement) -> Tensor:
        return losses.random_weights(len(now.losses), now.generator()).to(now.losses.device)


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

    def bind(self, tasks: Sequence[str]) -> None:
        self._keep(tasks, "s", "first", "second", "steps")

    def move(self, slope: Tensor, present: Tensor) -> None:
        """Take an Adam step against the slope `(T,)`, within the clamp; a missing task stays where it is."""
        # A short memory: slopes are exponential in s, and beside the first ones all later ones would look like nothing.
        slope = torch.where(present, slope, 0.0)
        memory = 1 - 0.1 * present.double()
        self.first.mul_(memory).add_(slope, alpha=0.1)
        self.second.mul_(memory).addcmul_(slope, slope, value=0.1)
        self.steps += present
        correction = 1 - 0.9**self.steps
        length = (self.second / correction).sqrt_().add_(1e-8).mul_(correction)
        self.s.sub_(torch.where(present, self.lr * self.first / length, 0.0)).clamp_(-self.clamp, self.clamp)


class Uncertainty(Learned):
    """exp(-s) / 2, where s are log variances."""

    positive = True

    def weigh(self, now: Measurement) -> Tensor:
        weights = torch.exp(-self.s) / 2
        self.move(0.5 - weights * now.losses, now.present)  # the gradient of `losses.uncertainty`
        return weights


class ImtlL(Learned):
    """exp(s), where s are log scales."""

    positive = True

    def weigh(self, now: Measurement) -> Tensor:
        weights = torch.exp(self.s)
        self.move(weights * now.losses - 1, now.present)  # the gradient of `losses.imtl_l`
        return weights


# By the gradients


class ByGradients(Rule):
    """Weights from the Gram matrix of the gradients alone."""

    uses_gradients = True

    def weigh(self, now: Measurement) -> Tensor:
        assert now.gram is not None
        weights = self.solve(now.gram, now)
        # A task whose gradient is 0, such as one with a head of zeros, has no say in the direction. That its head
        # learns all the same, it gets the mean weight of the others, or 1.
        still = now.present & (now.gram.diagonal() == 0)
        others = (now.present & ~still).sum()
        mean = weights.sum() / others
        return torch.where(still, torch.where(mean > 0, mean, 1.0), weights)

    def solve(self, gram: Tensor, now: Measurement) -> Tensor:
        """Return the weights for a Gram matrix `(T, T)`."""
        raise NotImplementedError


class GradientNorm(ByGradients):
    """1 / norm of the gradient."""

    def __init__(self, keep_length: bool = False) -> None:
        super().__init__()
        self.keep_length = keep_length

    def solve(self, gram: Tensor, now: Measurement) -> Tensor:
        return gradients.gradient_norm_weights(gram, self.keep_length)


class Mgda(ByGradients):
    """The shortest convex combination."""

    def solve(self, gram: Tensor, now: Measurement) -> Tensor:
        return gradients.min_norm_weights(gram)


class PcGrad(ByGradients):
    """Projections in random order, the same on all processes."""

    def solve(self, gram: Tensor, now: Measurement) -> Tensor:
        return gradients.pcgrad_weights(gram, now.generator())


class CaGrad(ByGradients):
    """Best for the worst task, near the mean gradient."""

    def __init__(self, c: float = 0.4) -> None:
        super().__init__()
        if c < 0:
            raise InputError(f"LossWeighting('cagrad', c={c}): use 0 or more.")
        self.c = c

    def solve(self, gram: Tensor, now: Measurement) -> Tensor:
        return gradients.cagrad_weights(gram, self.c)


class ImtlG(ByGradients):
    """Equal projections."""

    def solve(self, gram: Tensor, now: Measurement) -> Tensor:
        return gradients.imtl_g_weights(gram)


class GradNorm(Learned):
    """Learned weights that sum to T, so that slower tasks get larger gradients."""

    uses_gradients = True
    positive = True

    def __init__(self, lr: float = 0.05, clamp: float = 10.0, alpha: float = 1.5) -> None:
        super().__init__(lr, clamp)
        self.alpha = alpha
        self.initial = Initial(reference_batches=1)

    def bind(self, tasks: Sequence[str]) -> None:
        super().bind(tasks)
        self.initial.bind(tasks)

    def weigh(self, now: Measurement) -> Tensor:
        assert now.gram is not None
        norms, present = now.gram.diagonal().sqrt(), now.present
        rates = torch.where(present, now.losses / self.initial.measure(now), 1.0)
        with torch.enable_grad():
            s = self.s.clone().requires_grad_()
            slope = torch.autograd.grad(gradients.gradnorm(s, norms, rates, self.alpha), s)[0]
        weights = len(s) * self.s.softmax(0)
        self.move(slope, present)
        return weights


class Priority(ByGradients):
    """Lower the main tasks as far as no auxiliary rises."""

    def __init__(self, main: str | Sequence[str] | None = None) -> None:
        super().__init__()
        self.main = [main] if isinstance(main, str) else list(main or ())
        if not self.main:
            raise InputError("LossWeighting('priority'): name the main task or tasks, such as main='digit'.")

    def bind(self, tasks: Sequence[str]) -> None:
        if unknown := [name for name in self.main if name not in tasks]:
            raise InputError(f"LossWeighting('priority', main={unknown[0]!r}): no such task; use {', '.join(tasks)}.")
        self.indices = [tasks.index(name) for name in self.main]

    def solve(self, gram: Tensor, now: Measurement) -> Tensor:
        return gradients.priority_weights(gram, self.indices)


class TorchJd(ByGradients):
    """What an aggregator of torchjd makes of the Gram matrix, if that is all it looks at and it remembers nothing."""

    def __init__(
        self, aggregator: str = "AlignedMTL", aggregator_options: Mapping[str, float | str] | None = None
    ) -> None:
        super().__init__()
        try:
            import torchjd
            from torchjd import aggregation
        except ImportError as error:
            raise ImportError("LossWeighting('torchjd') needs torchjd: pip install 'torchjd>=0.18'") from error
        kinds: dict[str, Any] = {
            name: kind
            for name, kind in vars(aggregation).items()
            if isinstance(kind, type)
            and issubclass(kind, aggregation.GramianWeightedAggregator)
            and kind is not aggregation.GramianWeightedAggregator
            and not issubclass(kind, torchjd.Stateful)
        }
        if aggregator not in kinds:
            raise InputError(
                f"LossWeighting('torchjd', aggregator={aggregator!r}): use one of {', '.join(sorted(kinds))}."
            )
        try:
            self.weighting = kinds[aggregator](**aggregator_options or {}).gramian_weighting
        except TypeError as error:
            raise InputError(f"LossWeighting('torchjd', aggregator_options={aggregator_options}): {error}.") from error

    def solve(self, gram: Tensor, now: Measurement) -> Tensor:
        active = gram.diagonal() > 0
        weights = torch.zeros_like(gram[0])
        if not active.any():
            return weights
        with torch.random.fork_rng(devices=[]):
            # Some draw from the global generator, which differs between processes.
            torch.default_generator.manual_seed(now.seed)
            weights[active] = self.weighting(gram[active][:, active])
        return weights


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
    "torchjd": TorchJd,
}
