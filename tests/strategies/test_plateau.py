"""Schedulers that wait for a plateau, and the last metrics, in a run that was killed: as if it had not been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from kexue.strategies import SingleDevice

BATCHES, EPOCHS = 6, 3
VALIDATED: dict[str, dict[str, Any]] = {
    "each epoch": {},
    "in mid-epoch": {"val_check_interval": 3},
    "each second epoch": {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0},
    "never": {"limit_val_batches": 0},
}


class Watching(pl.LightningModule):
    """Lowers its rate at every look, or at every second, and remembers rates and losses by step."""

    def __init__(self, interval: str, monitor: str) -> None:
        super().__init__()
        self.interval, self.monitor = interval, monitor
        self.layer = torch.nn.Linear(4, 1)
        self.rates: dict[int, tuple[float, float]] = {}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss)
        self.rates[self.global_step] = (self.optimizers().param_groups[0]["lr"], loss.item())  # type: ignore[union-attr]
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.8, patience=int(self.interval == "step"), threshold=10.0
        )
        config = {"scheduler": scheduler, "interval": self.interval, "monitor": self.monitor, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}


class SaveEverywhere(pl.Callback):
    """A checkpoint wherever a run may leave one behind; the last batch of an epoch leaves it to what follows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: pl.Trainer, where: str) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step:02d}-{where}.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher) and trainer.global_step % BATCHES:  # type: ignore[arg-type]
            self._save(trainer, "1-batch")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "2-validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch < EPOCHS - 1:  # a run that goes on here is over and looks no more
            self._save(trainer, "3-epoch")

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "4-end")


def fit(model: Watching, *callbacks: pl.Callback, resume: Path | None = None, **options: Any) -> Any:
    pl.seed_everything(5, verbose=False)
    data = TensorDataset(torch.randn(4 * BATCHES, 4, generator=torch.Generator().manual_seed(1)))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=SingleDevice(), max_epochs=EPOCHS, callbacks=list(callbacks),
        use_distributed_sampler=False, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(
        model, DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=12),
        ckpt_path=resume, weights_only=True,
    )  # fmt: skip
    rate = model.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
    return rate, {key: value.item() for key, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("validated", VALIDATED)
def test_from_every_checkpoint_as_without_the_kill(validated: str, interval: str, tmp_path: Path) -> None:
    options = VALIDATED[validated]
    monitor = "train/loss" if validated == "never" else "val/loss"
    whole = Watching(interval, monitor)
    last = fit(whole, SaveEverywhere(tmp_path), **options)
    assert len({rate for rate, _ in whole.rates.values()}) > 1, "it has looked"
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) >= EPOCHS * BATCHES
    for checkpoint in checkpoints:
        step = int(checkpoint.name[:2])
        again = Watching(interval, monitor)
        assert fit(again, resume=checkpoint, **options) == last, checkpoint.name
        assert again.rates == {at: rate for at, rate in whole.rates.items() if at >= step}, checkpoint.name
