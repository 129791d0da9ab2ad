"""Steps of even length for losses whose gradient fades."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..errors import InputError


class GradientNormaliser(pl.Callback):
    """Divide the loss, and so all gradients, by a running mean of the norm of the gradients of the steps before.

    For SGD with a loss such as EXACT, whose gradient is small where items are clearly right or wrong; Adam makes even
    steps by itself. The published form divides by a mean that includes the gradient at hand; with the mean before it,
    gradients that ZeRO divides among processes need not be touched.

    Under ZeRO the norm is that of the engine, which computes it if it clips gradients, and at stage 3.

    Args:
        momentum: Share of the mean that stays in a step, 0 to below 1.
        floor: The least number to divide by.

    Raises:
        InputError: If an argument is out of range, or ZeRO computes no norm.
    """

    def __init__(self, momentum: float = 0.9, floor: float = 0.01) -> None:
        if not 0 <= momentum < 1:
            raise InputError(f"GradientNormaliser(momentum={momentum}): use a number from 0 to below 1.")
        if floor <= 0:
            raise InputError(f"GradientNormaliser(floor={floor}): use a number above 0.")
        self.momentum = momentum
        self.floor = floor
        self._mean: float | None = None
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return {"mean": self._mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the mean of the checkpoint."""
        self._mean = state_dict["mean"]

    @property
    def divisor(self) -> float:
        """What losses are divided by now; 1 before the first step."""
        return 1.0 if self._mean is None else max(self._mean, self.floor)

    def update(self, norm: float) -> None:
        """Take up the norm of the gradients of a step, as they would have been undivided; an overflow is left out."""
        if math.isfinite(norm):
            self._mean = norm if self._mean is None else self.momentum * self._mean + (1 - self.momentum) * norm

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the run is."""
        self._step = trainer.global_step

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Divide what flows back from the loss; its value stays."""
        divisor = self.divisor
        if divisor != 1:
            loss.register_hook(lambda gradient: gradient / divisor)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure, where every process holds all gradients."""
        if _engine(trainer) is None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.update(torch.nn.utils.get_total_norm(gradients).item() * self.divisor)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the engine where they are divided."""
        engine = _engine(trainer)
        if engine is None or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        norm = engine.get_global_grad_norm()
        if norm is None:
            raise InputError(
                "GradientNormaliser: ZeRO computes no norm of the gradients; set trainer.gradient_clip_val "
                "(1e6, say, never clips), or use strategy=zero_3."
            )
        self.update(float(norm) * self.divisor)


def _engine(trainer: pl.Trainer) -> Any:
    return getattr(trainer.strategy, "deepspeed_engine", None)
