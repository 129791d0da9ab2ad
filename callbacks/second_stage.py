"""Training goes on from its best weights, more slowly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor

from ..errors import InputError


def second_stage_begins(
    scores: Sequence[float], latest: int = 30, earliest: int = 15, least: float = 0.5, patience: int = 5
) -> bool:
    """Whether the first stage is over.

    Args:
        scores: of every epoch so far, the higher the better.
        latest: epochs after which it is over in any case.
        earliest: epochs before which it is not.
        least: between these it is over when the last score is below this,
        patience: or when the best of all is not among so many last ones.
    """
    if len(scores) >= latest:
        return True
    if len(scores) < earliest:
        return False
    return scores[-1] < least or max(scores[-patience:]) < max(scores)


class SecondStage(pl.Callback):
    """Go back to the best weights once, and on from there with another learning rate and a fresh optimizer.

    What the optimizer keeps is dropped, and with it what techniques keep there: an average of the weights (EMA) begins
    anew. Checkpoints of the first stage carry its best weights, so that a run that goes on can do the same.

    Source: https://kexue.fm/archives/6906.

    Args:
        monitor: the metric, taken at every validation.
        mode: whether it is to be high ("max") or low ("min"; `least` is then the highest).
        lr: learning rate of the second stage.
        latest, earliest, least, patience: when it begins, see `second_stage_begins`, in validations.

    Raises:
        InputError: an argument is out of range; when training starts, under ZeRO, whose weights are in parts.
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["max", "min"] = "max",
        lr: float = 1e-4,
        latest: int = 30,
        earliest: int = 15,
        least: float = 0.5,
        patience: int = 5,
    ) -> None:
        if mode not in ("max", "min"):
            raise InputError(f"SecondStage(mode={mode!r}): use max or min.")
        if lr <= 0:
            raise InputError(f"SecondStage(lr={lr}): use a number above 0.")
        for name, value in (("earliest", earliest), ("patience", patience), ("latest", latest)):
            if value < 1:
                raise InputError(f"SecondStage({name}={value}): use 1 or more.")
        self.monitor = monitor
        self.sign = 1.0 if mode == "max" else -1.0
        self.lr = lr
        self.rule = {"latest": latest, "earliest": earliest, "least": self.sign * least, "patience": patience}
        self.scores: list[float] = []
        self.begun = False
        self._best: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot be done."""
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            raise InputError("SecondStage: ZeRO divides the weights; use strategy=ddp, or leave this callback out.")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the weights as they were evaluated, which may be averages; the metric is not known yet."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self.begun:
            self._seen = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the score, and keep the weights if they are the best."""
        if not self._seen:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(map(str, trainer.callback_metrics)))
            raise InputError(f"SecondStage(monitor={self.monitor!r}): not logged; use one of {known}.")
        self.scores.append(self.sign * float(trainer.callback_metrics[self.monitor]))
        if self.scores[-1] == max(self.scores) and self.scores.count(self.scores[-1]) == 1:
            self._best = self._seen
        self._seen = {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin the second stage when it is time; so does a run that goes on from the last checkpoint of the first."""
        if self.begun or not self.scores or not second_stage_begins(self.scores, **self.rule):
            return
        self.begun = True
        pl_module.load_state_dict(self._best)
        self._best = {}
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = self.lr
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [self.lr for _ in config.scheduler.base_lrs]  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """Scores, whether the second stage has begun, and until then the best weights."""
        return {"scores": self.scores, "begun": self.begun, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
        self.scores, self.begun, self._best = list(state_dict["scores"]), state_dict["begun"], state_dict["best"]
