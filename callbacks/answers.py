"""What several callbacks read after a test: a classifier's answers, and something of every process in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch

T = TypeVar("T")


def has_answers(outputs: Any) -> bool:
    """Tell whether `test_step` has returned `{"prediction": (B,), "target": (B,)}`."""
    return isinstance(outputs, Mapping) and {"prediction", "target"} <= outputs.keys()


def gathered(trainer: pl.Trainer, part: T) -> list[T]:
    """Return the part of every process, in the order of ranks, on each of them; keep it small, it is pickled."""
    if trainer.world_size == 1:
        return [part]
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, part)
    return parts
