"""Entity linking on two processes, some texts without mentions: DDP, ZeRO, resumed, and under bf16."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cells import WORLD, full_weights, make_strategy
from ranks import run_ranks

CELLS: dict[str, dict[str, Any]] = {
    "ddp": {"base": "ddp"},
    "zero_2": {"base": "zero_2"},
    "ddp_bf16": {"base": "ddp", "precision": "bf16-mixed"},
    "zero_2_bf16": {"base": "zero_2", "precision": "bf16-mixed"},
    "zero_3": {"base": "zero_3"},
    "half": {"base": "zero_2", "epochs": 1, "save": True},
    "resumed": {"base": "zero_2", "resume": True},
}


def fit_all(folder: str) -> dict[str, dict[str, Any]]:
    """Train every cell in this process; the last ones of the rows mention nobody."""
    import pytorch_lightning as pl
    import torch

    from kexue.data.linking import LinkDataModule
    from kexue.data.records import LinkRecord
    from kexue.lightning_modules.extraction.entity_linking import EntityLinker

    warnings.filterwarnings("ignore")
    place = str(Path(folder) / "half.ckpt")
    results = {}
    for name, cell in CELLS.items():
        data = LinkDataModule(4, num_generated=16)
        rows = [*data.records("train")[:14], *(LinkRecord(f"x{i}", "无人" * (i + 1)) for i in range(2))]
        data.set_records("train", rows)
        data.set_records("val", rows[-6:])
        data.prepare()
        pl.seed_everything(3, verbose=False)
        optimizer = functools.partial(torch.optim.SGD, lr=0.1)
        model = EntityLinker(**data.model_arguments(), dim=16, num_heads=2, dropout=0.1, optimizer=optimizer)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=WORLD,
            strategy=make_strategy(cell["base"], []),
            precision=cell.get("precision", "32-true"),
            max_epochs=cell.get("epochs", 2),
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, datamodule=data, ckpt_path=place if cell.get("resume") else None)
        if cell.get("save"):
            trainer.save_checkpoint(place)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        results[name] = {"weights": full_weights(model), "metrics": metrics, "step": trainer.global_step}
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_ranks(fit_all, 2, str(tmp_path_factory.mktemp("linking")))


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float(np.abs(one["weights"][name] - other["weights"][name]).max()) for name in other["weights"])


@pytest.mark.parametrize("name", ["zero_2", "zero_3"])
def test_zero_takes_the_steps_of_ddp(name: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0][name]["step"] == ranks[0]["ddp"]["step"] == 4
    assert distance(ranks[0][name], ranks[0]["ddp"]) <= 1e-6


def test_a_resumed_run_ends_where_the_whole_one_does(ranks: list[dict[str, Any]]) -> None:
    assert distance(ranks[0]["half"], ranks[0]["zero_2"]) > 1e-4
    assert distance(ranks[0]["resumed"], ranks[0]["zero_2"]) == 0


def test_bf16_stays_near_float32(ranks: list[dict[str, Any]]) -> None:
    assert distance(ranks[0]["zero_2_bf16"], ranks[0]["ddp_bf16"]) <= 2**-8
    assert 0 < distance(ranks[0]["ddp_bf16"], ranks[0]["ddp"]) <= 2**-5
    assert all(np.isfinite(value).all() for value in ranks[0]["ddp_bf16"]["weights"].values())


def test_all_processes_have_the_same_scores(ranks: list[dict[str, Any]]) -> None:
    for name in ("ddp", "zero_2"):
        assert ranks[0][name]["metrics"] == ranks[1][name]["metrics"]
        assert "val/f1" in ranks[0][name]["metrics"]
