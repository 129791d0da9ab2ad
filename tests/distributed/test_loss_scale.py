"""The scale of the loss at 16-mixed goes on over a resume, on the same base and on another one.

On a CPU Lightning turns 16-mixed into bf16-mixed; given as a plugin it is what a GPU runs, slowly.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import RANK, WORLD, PlainModule, loader, make_strategy
from pytorch_lightning.plugins.precision import DeepSpeedPrecision, MixedPrecision
from ranks import run_ranks

BASES = ("ddp", "zero_1", "zero_3")
PAIRS = [(base, base) for base in BASES] + [
    ("ddp", "zero_1"),
    ("zero_1", "ddp"),
    ("zero_1", "zero_3"),
    ("zero_3", "ddp"),
]
STEPS = 6


class Scale(pl.Callback):
    """Sets a scale that no run begins with, or looks at the one that is there."""

    def __init__(self, first: float | None) -> None:
        self.first = first
        self.seen: dict[str, Any] = {}

    @staticmethod
    def _scaler(trainer: pl.Trainer) -> Any:
        strategy: Any = trainer.strategy
        return trainer.precision_plugin.scaler if strategy.name == "ddp" else strategy.loss_scale  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        scaler = self._scaler(trainer)
        if self.first is not None:
            scaler.load_state_dict({**scaler.state_dict(), "scale": self.first})
        self.seen = scaler.state_dict()


def train(base: str, resume: str | None, save: str | None) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    model, scale = PlainModule(dropout=0.1), Scale(256.0 if resume is None else None)
    ddp = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    trainer = pl.Trainer(
        accelerator="cpu", devices=WORLD, strategy=make_strategy(base, []), max_epochs=2 if resume else 1,
        plugins=[ddp if base == "ddp" else DeepSpeedPrecision("16-mixed")], callbacks=[scale], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, loader(RANK, WORLD, 4 * STEPS, 4), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return scale.seen


def all_pairs(folder: str) -> dict[Any, dict[str, Any]]:
    warnings.filterwarnings("ignore")
    found: dict[Any, dict[str, Any]] = {}
    for base in BASES:
        train(base, None, f"{folder}/{base}.ckpt")
    for before, after in PAIRS:
        found[before, after] = train(after, f"{folder}/{before}.ckpt", None)
    return found


@pytest.mark.slow
def test_the_scale_goes_on_everywhere(tmp_path: Path) -> None:
    for rank in run_ranks(all_pairs, 2, str(tmp_path)):
        for pair, state in rank.items():
            assert state["scale"] == 256.0, pair
            assert state["_growth_tracker"] == STEPS, pair
