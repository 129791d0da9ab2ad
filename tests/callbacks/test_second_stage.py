"""The second stage: when it begins, from which weights, at which rate, and the same in a run that goes on."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from kexue.callbacks import SecondStage, second_stage_begins
from kexue.errors import InputError
from kexue.strategies import Zero

SCORES = [0.1, 0.6, 0.3, 0.2, 0.7, 0.7]
"""What the module below claims after each epoch."""


@pytest.mark.parametrize(
    ("scores", "begins"),
    [
        ([], False),
        ([0.9] * 30, True),
        ([i / 100 + 0.5 for i in range(29)], False),
        ([i / 100 + 0.5 for i in range(30)], True),
        ([0.4] * 14, False),
        ([0.4] * 15, True),
        ([0.6] * 14 + [0.49], True),
        ([0.6] * 15, False),
        ([0.6] * 9 + [0.8] + [0.7] * 5, True),
        ([0.6] * 10 + [0.8] + [0.7] * 4, False),
    ],
)
def test_it_begins_late_or_where_nothing_gets_better(scores: list[float], begins: bool) -> None:
    assert second_stage_begins(scores) is begins


class Claims(pl.LightningModule):
    """Learns something; its scores are written beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.rates: list[float] = []
        self.weights: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        if batch_idx == 0:
            self.weights.append(self.layer.weight.detach().clone())
        return (self.layer(batch) - 1).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/f1", SCORES[self.current_epoch])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)}


def fit(folder: Path, epochs: int, resume: Path | None = None, **options: Any) -> tuple[pl.Trainer, Claims]:
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(torch.randn(8, 3), batch_size=4)  # type: ignore[arg-type]
    stage = SecondStage("val/f1", lr=0.01, earliest=2, latest=9, least=0.0, patience=2)
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[stage], **{**quiet, **options})
    module = Claims()
    trainer.fit(module, loader, loader, ckpt_path=resume, weights_only=True)
    return trainer, module


def test_it_goes_on_from_the_best_weights_with_a_fresh_optimizer(tmp_path: Path) -> None:
    """The best of 0.1, 0.6, 0.3, 0.2 is the second; after it there was nothing better twice, once and for all."""
    trainer, module = fit(tmp_path, 6)
    assert module.rates == pytest.approx([0.1] * 8 + [0.01] * 4)
    assert torch.equal(module.weights[4], module.weights[2])
    assert not torch.equal(module.weights[3], module.weights[2])
    steps = [int(state["step"]) for state in trainer.optimizers[0].state.values()]
    assert steps == [4, 4]
    (stage,) = [callback for callback in trainer.callbacks if isinstance(callback, SecondStage)]
    assert stage.state_dict() == {"scores": pytest.approx(SCORES[:4]), "begun": True, "best": {}}


@pytest.mark.parametrize("epochs", [3, 4, 5])
def test_a_run_that_goes_on_does_the_same(tmp_path: Path, epochs: int) -> None:
    _, whole = fit(tmp_path, 6)
    half, _ = fit(tmp_path, epochs)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(tmp_path, 6, tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_wrong_arguments_are_explained(tmp_path: Path) -> None:
    for name, value in (("mode", "best"), ("lr", 0), ("latest", 0), ("patience", 0)):
        with pytest.raises(InputError, match=f"SecondStage\\({name}={value!r}\\)"):
            SecondStage("val/f1", **{name: value})  # type: ignore[arg-type]
    sharded = pl.Trainer(strategy=Zero(stage=2), logger=False, devices=1, accelerator="cpu")
    with pytest.raises(InputError, match="ZeRO divides the weights; use strategy=ddp"):
        SecondStage("val/f1").on_fit_start(sharded, Claims())
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[SecondStage("val/em")], **quiet)
    loader = DataLoader(torch.randn(8, 3), batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"monitor='val/em'\): not logged; use one of val/f1"):
        trainer.fit(Claims(), loader, loader)
