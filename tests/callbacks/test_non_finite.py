"""A loss that is not finite ends a run before it reaches weights or checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kexue.callbacks import Checkpoints, StopOnNonFinite
from kexue.errors import InputError
from kexue.strategies import SingleDevice, load_weights


class Fails(pl.LightningModule):
    """Its loss is not finite from the fourth batch on."""

    def __init__(self, value: float = float("nan"), manual: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.value = value
        self.automatic_optimization = not manual

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.layer(batch).square().mean()
        loss = loss * self.value if batch_idx >= 3 else loss
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        self.optimizers().step()  # type: ignore[union-attr]
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: pl.LightningModule, *callbacks: pl.Callback) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=SingleDevice(),
        max_epochs=1,
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(len(callbacks) > 1),
    )
    trainer.fit(model, DataLoader(torch.ones(8, 3, 2), batch_size=None))  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("manual", [False, True])
def test_weights_and_checkpoints_stay_sound(value: float, manual: bool, tmp_path: Path) -> None:
    model = Fails(value, manual)
    with pytest.raises(InputError, match=r"not finite at step 3: .*the last checkpoint is .*step=00000003"):
        fit(model, StopOnNonFinite(), Checkpoints(tmp_path, every_n_steps=1))
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(value.isfinite().all() for value in load_weights(tmp_path / "last.ckpt").values())


def test_a_run_with_finite_losses_ends_as_always() -> None:
    assert fit(Fails(1.0), StopOnNonFinite()).global_step == 8


class Later(StopOnNonFinite):
    """Notes losses as on a GPU: not looked at before it has to."""

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite


def test_a_gpu_is_looked_at_before_a_checkpoint(tmp_path: Path) -> None:
    model = Fails()
    with pytest.raises(InputError, match="not finite at step"):
        fit(model, Later(), Checkpoints(tmp_path))
    assert not list(tmp_path.glob("*.ckpt"))  # the weights were spoilt by then, and not written


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="use 1 or more"):
        StopOnNonFinite(every_n_steps=0)


def test_the_second_process_is_named() -> None:
    trainer: Any = type(
        "Trainer", (), {"global_step": 4, "global_rank": 1, "world_size": 2, "checkpoint_callback": 0}
    )()
    with pytest.raises(InputError, match="not finite at step 4 on rank 1: try a lower learning rate"):
        StopOnNonFinite().on_before_backward(trainer, None, torch.tensor(float("nan")))  # type: ignore[arg-type]
