"""How the learning rate of a module moves."""

from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer

from ..errors import InputError

Schedule = Literal["constant", "linear"]


def check_schedule(model: str, schedule: str) -> None:
    """Refuse an unknown name.

    Raises:
        InputError: it is not among the schedules.
    """
    if schedule not in get_args(Schedule):
        raise InputError(f"{model}(schedule={schedule!r}): use one of {', '.join(get_args(Schedule))}")


def scheduled(module: pl.LightningModule, optimizer: Optimizer, schedule: Schedule, warmup_steps: int) -> Any:
    """What `configure_optimizers` returns.

    Args:
        module: whose trainer says where a linear schedule ends.
        optimizer: its optimizer.
        schedule: after the warm-up, "constant", or "linear" down to 0 at the trainer's last step.
        warmup_steps: steps over which the rate rises to its full value.

    Raises:
        InputError: "linear" without an end.
    """
    if schedule == "constant" and not warmup_steps:
        return optimizer
    last = module.trainer.estimated_stepping_batches if schedule == "linear" else None
    if last == float("inf"):
        raise InputError(
            f"{type(module).__name__}(schedule='linear'): set trainer.max_epochs or trainer.max_steps, where it ends"
        )

    def share(step: int) -> float:
        risen = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        return risen if last is None else risen * max(0.0, 1 - step / last)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
