"""Deliberately wrong techniques: the matrix has to tell each of them from the right one, and only where it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from cells import WORLD
from matrix import Row
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from kexue.strategies import (
    ActivationCheckpointing,
    Lookahead,
    LookaheadOptimizer,
    LossWeighting,
    Technique,
    find_blocks,
)
from kexue.strategies.loss_weighting import processes


class Recomputation(ActivationCheckpointing):
    """Recomputes by torch's own function with the wrong options."""

    def __init__(self, blocks: Any = None, **options: Any) -> None:
        super().__init__(blocks=blocks)
        self.options = options

    def attach(self, module: pl.LightningModule) -> None:
        self._attached = find_blocks(module, self.blocks)
        for block in self._attached:
            block.forward = partial(checkpoint, block.forward, **self.options)

    def detach(self, module: pl.LightningModule) -> None:
        for block in self._attached:
            del block.__dict__["forward"]


class EarlyCopies(LookaheadOptimizer):
    """Copies the parameters it is constructed with, and moves them by their place in the list."""

    def __init__(self, inner: Optimizer, k: int, alpha: float) -> None:
        super().__init__(inner, k, alpha)
        self.copies = [p.detach().clone() for group in inner.param_groups for p in group["params"]]
        self.count = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        result = self.inner.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            with torch.no_grad():
                parameters = [p for group in self.param_groups for p in group["params"]]
                for p, slow in zip(parameters, self.copies, strict=True):
                    p.copy_(slow.lerp_(p, self.alpha))
        return result


class EarlyLookahead(Lookahead):
    def wrap_optimizer(self, optimizer: Optimizer) -> Optimizer:
        self._optimizers.append(EarlyCopies(optimizer, self.k, self.alpha))
        return self._optimizers[-1]


class OwnWeights(LossWeighting):
    """Goes by the losses of its own process, as if all the others had the same."""

    def combine(self, outputs: Any, module: pl.LightningModule) -> Any:
        right = processes.total
        processes.total = lambda values: values * WORLD
        try:
            return super().combine(outputs, module)
        finally:
            processes.total = right


@dataclass(frozen=True)
class Wrong(Row):
    """A row that is wrong.

    Attributes:
        technique: Name of the module to the wrong technique.
        caught: Base to a pattern of what the comparison says; elsewhere it finds nothing wrong.
    """

    technique: Callable[[str], Technique] | None = None
    caught: Mapping[str, str] = field(default_factory=dict)

    def build(self, module: str) -> list[Technique]:
        assert self.technique is not None
        return [self.technique(module)]


APART = r"^differs by \S+, bound"
TWO = ("ddp", "zero_1", "zero_2", "zero_3")
_WRONG = (
    Wrong(
        ("recomputation that draws new random numbers",),
        right="activation_checkpointing",
        like="none",
        modules=("kexue",),
        technique=lambda module: Recomputation(use_reentrant=False, preserve_rng_state=False),
        caught=dict.fromkeys(("single", *TWO), "differs from none by"),
    ),
    Wrong(
        ("reentrant recomputation of shared layers",),
        right="activation_checkpointing",
        like="none",
        modules=("shared",),
        technique=lambda module: Recomputation(use_reentrant=True),
        # Stage 1 reduces after the whole backward pass, and so once.
        caught={"ddp": "ready only once", "zero_2": "already been reduced", "zero_3": "AssertionError"},
    ),
    Wrong(
        ("slow weights copied before sharding",),
        right="lookahead, fast",
        modules=("kexue",),
        technique=lambda module: EarlyLookahead(k=3, evaluate="fast"),
        # What is not in the optimiser's state is not saved either.
        caught={"single": "resumed differs", "ddp": "resumed differs", **dict.fromkeys(TWO[1:], f"{APART}|Error")},
    ),
    Wrong(
        ("loss weights of each process's own",),
        right="loss_weighting, uncertainty",
        modules=("kexue",),
        technique=lambda module: OwnWeights("uncertainty", smoothing=0.5, lr=0.1),
        caught=dict.fromkeys(TWO, APART),
    ),
)
WRONG = {row.name: row for row in _WRONG}
