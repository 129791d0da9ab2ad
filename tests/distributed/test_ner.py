"""Taggers and span scorers on two processes: ZeRO gives DDP's numbers, in float32 and under bf16's autocast."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import differences, full_weights, make_strategy
from ner_models import MODELS as ENTITIES
from ner_models import Losses
from ranks import run_ranks

from kexue.data.events import EventDataModule
from kexue.data.ner import NerDataModule
from kexue.lightning_modules.extraction import Lic2020Event

pytestmark = pytest.mark.slow

MODELS: dict[str, Any] = {**ENTITIES, "lic2020_event": functools.partial(Lic2020Event, output="multi", crf_rate=2.0)}

CELLS = [
    *((name, base, "32-true") for name in MODELS for base in ("ddp", "zero_2", "zero_3")),
    *((name, base, "bf16-mixed") for name in MODELS for base in ("ddp", "zero_2")),
]


def train(name: str, base: str, precision: Any) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    windows = {"num_generated": 24, "max_length": 40, "stride": 20}
    if name in ENTITIES:
        source: Any = NerDataModule(4, dictionary=True, **windows)
    else:
        source = EventDataModule(4, **windows)
    source.prepare()
    module = MODELS[name](
        **source.model_arguments(),
        dim=16,
        num_layers=1,
        num_heads=2,
        feedforward_dim=32,
        dropout=0.0,
        optimizer=functools.partial(torch.optim.SGD, lr=0.01),
    )
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_strategy(base, []),
        max_epochs=2,
        precision=precision,
        callbacks=[losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=source)
    scores = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    return {"losses": losses.values, "weights": full_weights(module), "scores": scores}


def train_all() -> dict[Any, Any]:
    warnings.filterwarnings("ignore")
    return {cell: train(*cell) for cell in CELLS}


@pytest.fixture(scope="module")
def runs() -> list[dict[Any, Any]]:
    return run_ranks(train_all, 2)


@pytest.mark.parametrize("name", MODELS)
def test_zero_gives_the_numbers_of_ddp(name: str, runs: list[dict[Any, Any]]) -> None:
    for base in ("zero_2", "zero_3"):
        losses, weights = differences(runs[0][name, base, "32-true"], runs[0][name, "ddp", "32-true"])
        assert losses <= 1e-5
        assert weights <= 1e-6
    plain = runs[0][name, "ddp", "32-true"]["losses"]
    assert len(plain) == 6
    assert plain[-1] < plain[0]


@pytest.mark.parametrize("name", MODELS)
def test_bf16_trains_alike_on_both(name: str, runs: list[dict[Any, Any]]) -> None:
    half, whole = (runs[0][name, "ddp", precision]["losses"] for precision in ("bf16-mixed", "32-true"))
    assert half != whole
    assert half == pytest.approx(whole, rel=0.05)
    assert differences(runs[0][name, "zero_2", "bf16-mixed"], runs[0][name, "ddp", "bf16-mixed"])[0] <= 2**-8


def test_ranks_agree_on_scores(runs: list[dict[Any, Any]]) -> None:
    for cell in CELLS:
        assert runs[0][cell]["scores"] == runs[1][cell]["scores"]
