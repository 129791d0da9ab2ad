"""EMA: an exponential moving average of the weights, which is evaluated and saved while training goes on beside it.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (1992); the warm-up of the decay is
that of TensorFlow's ExponentialMovingAverage.  Checked against: the formula written plainly, and
`torch.optim.swa_utils.AveragedModel` (tests/strategies/test_ema.py).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import InputError
from .swap import exchange_state
from .technique import Technique

AVERAGE = "ema"
STEP = "ema_step"


@torch.no_grad()
def ema_update(averages: list[Tensor], weights: list[Tensor], decay: float) -> None:
    """Move averages towards weights, in place: `average = decay * average + (1 - decay) * weight`.

    Args:
        averages: The averages, float32 or wider.
        weights: The weights after a step, same shapes and dtypes.
        decay: Share that stays, 0 to 1.
    """
    if averages:
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def ema_decay(step: int, decay: float, warmup: bool = True) -> float:
    """Return the decay of an update.

    The first step has decay 0: its weights are the first average, so a random start has no part in it.  With warm-up,
    step t + 1 has at most (1 + t) / (10 + t): the average is over about the last tenth of the steps until `decay` is
    the smaller.

    Args:
        step: Number of the step, from 1.
        decay: The decay to end with.
        warmup: Whether it starts lower.
    """
    if step == 1:
        return 0.0
    return min(decay, step / (9 + step)) if warmup else decay


class EMA(Technique):
    """Evaluate and save an average of the weights instead of the weights that train. Card: docs/cards/ema.md.

    The average is updated by every step that an optimiser really takes: once a window of accumulated gradients, and not
    where an overflow in half precision makes the step fall out.

    Args:
        decay: Share of the average that stays in a step, 0 to below 1.
        warmup: Let the decay rise to that from the start of training.

    Raises:
        InputError: If the decay is out of range, or, when training starts, if the weights are in half precision.
    """

    copies = (AVERAGE,)
    follows = ("Lookahead",)

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0.0 <= decay < 1.0:
            raise InputError(f"EMA(decay={decay}): use a number from 0 to below 1.")
        self.decay = decay
        self.warmup = warmup
        self._optimizers: list[Optimizer] = []
        self._hooks: list[RemovableHandle] = []

    def attach(self, module: pl.LightningModule) -> None:
        self._optimizers = []

    def detach(self, module: pl.LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        self._optimizers.append(optimizer)
        self._hooks.append(optimizer.register_step_post_hook(self._update))
        return optimizer

    def _update(self, optimizer: Optimizer, *_: Any) -> None:
        """After a step: make or update `state[p]`, of the parameters that took it (ZeRO steps its groups in turn)."""
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and overflow.item():
            return  # a grad scaler calls fused optimisers in any case, and they do nothing
        due: dict[tuple[int, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                entry = optimizer.state[p]
                step = entry[STEP] = entry.get(STEP, 0) + 1
                if AVERAGE in entry:
                    due[step, p.dtype, p.device].append(p)
                else:
                    _check_dtype(p)
                    entry[AVERAGE] = p.detach().clone()
        for (step, *_rest), weights in due.items():
            averages = [optimizer.state[p][AVERAGE] for p in weights]
            ema_update(averages, weights, ema_decay(step, self.decay, self.warmup))

    @property
    def evaluates(self) -> str | None:
        return "average"

    def exchange(self, module: pl.LightningModule) -> None:
        for optimizer in self._optimizers:
            exchange_state(optimizer, AVERAGE)


def _check_dtype(p: Tensor) -> None:
    if torch.finfo(p.dtype).bits < 32:
        raise InputError(
            f"EMA: the weights are {p.dtype}, too coarse to average in: use precision=bf16-mixed or 16-mixed, "
            "or a ZeRO strategy, which steps float32 weights at any precision."
        )
