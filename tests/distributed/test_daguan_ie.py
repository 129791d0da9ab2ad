"""The tagger of the Daguan cup on two processes: ZeRO gives DDP's numbers, rates of single layers and all."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import differences, full_weights, make_strategy
from ner_models import Losses
from ranks import run_ranks

from kexue.data.daguan_2019 import DaguanCorpusDataModule, DaguanDataModule
from kexue.lightning_modules.extraction import DaguanIE
from kexue.lightning_modules.pretraining import MaskedLM
from kexue.strategies import Lookahead, StartFrom

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "crf": {"head": "crf", "encoder_rate": 0.5, "layer_decay": 0.5, "crf_rate": 2.0},
    "span": {"head": "span", "trunk": "convolution", "trunk_layers": 2, "encoder_rate": 0.5},
    "masked_lm": {},
}
SIZES: dict[str, Any] = {"dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 32, "dropout": 0.0}
MODELS["started"] = MODELS["crf"]
CELLS: list[tuple[str, str, str]] = [
    *((name, base, "32-true") for name in MODELS for base in ("ddp", "zero_2")),
    *((name, "zero_3", "32-true") for name in ("crf", "started")),
    *(("crf", base, "bf16-mixed") for base in ("ddp", "zero_2")),
]


def train(folder: str, name: str, base: str, precision: Any) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    start = [StartFrom(f"{folder}/start.ckpt")] if name == "started" else []
    optimizer = functools.partial(torch.optim.SGD, lr=0.02)
    if name == "masked_lm":
        source: Any = DaguanCorpusDataModule(4, num_generated=24)
        source.prepare()
        module: Any = MaskedLM(**source.model_arguments(), **SIZES, run_shares=[0.5, 0.5], optimizer=optimizer)
    else:
        source = DaguanDataModule(4, num_generated=24, max_length=40, stride=20)
        source.prepare()
        module = DaguanIE(
            **source.model_arguments(), **{**SIZES, "trunk_dropout": 0.0, **MODELS[name]}, optimizer=optimizer
        )
        if module.trunk_kind == "convolution":
            module.configure_model()
            for part in module.trunk.modules():  # type: ignore[union-attr]
                if hasattr(part, "rate"):
                    part.rate = 0.0  # each process has noise of its own
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_strategy(base, [*start, Lookahead(k=2)]),
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


def train_all(folder: str) -> dict[Any, Any]:
    warnings.filterwarnings("ignore")
    return {cell: train(folder, *cell) for cell in CELLS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("start")
    source = DaguanDataModule(4, num_generated=24)
    module = DaguanIE(**source.model_arguments(), **SIZES)
    pl.seed_everything(11, verbose=False)
    module.configure_model()
    torch.save({"state_dict": module.state_dict()}, folder / "start.ckpt")
    return run_ranks(train_all, 2, str(folder))


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell[1] != "ddp" and cell[2] == "32-true"], ids="-".join)
def test_zero_gives_the_numbers_of_ddp(cell: tuple[str, str, str], runs: list[dict[Any, Any]]) -> None:
    plain = runs[0][cell[0], "ddp", "32-true"]
    losses, weights = differences(runs[0][cell], plain)
    assert losses <= 1e-5
    assert weights <= 1e-6
    assert len(plain["losses"]) == 6
    if cell[0] != "masked_lm":  # which has other tokens to guess in each epoch
        assert sum(plain["losses"][3:]) < sum(plain["losses"][:3])


def test_a_run_that_starts_from_another_is_another_one(runs: list[dict[Any, Any]]) -> None:
    assert runs[0]["started", "ddp", "32-true"]["losses"][0] != runs[0]["crf", "ddp", "32-true"]["losses"][0]


def test_bf16_trains_alike(runs: list[dict[Any, Any]]) -> None:
    half, whole = (runs[0]["crf", "ddp", precision]["losses"] for precision in ("bf16-mixed", "32-true"))
    assert half != whole
    assert half == pytest.approx(whole, rel=0.05)


def test_bf16_trains_alike_at_zero_2(runs: list[dict[Any, Any]]) -> None:
    assert differences(runs[0]["crf", "zero_2", "bf16-mixed"], runs[0]["crf", "ddp", "bf16-mixed"])[0] <= 2**-8


def test_ranks_agree_on_scores(runs: list[dict[Any, Any]]) -> None:
    for cell in CELLS:
        assert runs[0][cell]["scores"] == runs[1][cell]["scores"]
