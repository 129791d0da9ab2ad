"""The Daguan cup's rows: annotations survive the way through the targets, and can be learnt."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from daguan_models import PLANS, techniques
from ner_models import round_trip, trainer

from kexue.data.daguan_2019 import DaguanDataModule
from kexue.data.ner import NerDataModule
from kexue.lightning_modules.extraction import DaguanIE
from kexue.strategies import SingleDevice


def root() -> str:
    found = os.environ.get("KEXUE_DATA")
    if not found or not Path(found, "daguan_2019").is_dir():
        pytest.skip("KEXUE_DATA does not name a folder with daguan_2019")
    return found


@pytest.mark.parametrize("options", [{}, {"max_length": 130, "stride": 64}], ids=["long", "windows"])
def test_gold_annotations_decode_to_themselves(options: dict[str, Any]) -> None:
    """Fields neither overlap nor are cut by windows: of 1,500 rows nothing is lost, also by the other models' heads."""
    files = {"train_file": "daguan_2019/train.txt.gz", "dev_file": "daguan_2019/dev.txt"}
    source = NerDataModule(24, root=root(), format="daguan", **files, **options)
    source.setup("fit")
    assert round_trip("ner_crf", source) == round_trip("ner_global_pointer", source) == 0
    assert not any(source.not_representable("train").values())


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_60_sentences_are_learnt_by_heart(plan: str, tmp_path: Path) -> None:
    source = DaguanDataModule(10, root=root(), min_count=1)
    source.setup("fit")
    rows = [row for row in source.records("train") if len(row.text) < 300][:60]
    source.set_records("train", rows)
    source.set_records("val", rows)
    pl.seed_everything(0, verbose=False)
    module = DaguanIE(
        **source.model_arguments(),
        **{"trunk_dropout": 0.0, **PLANS[plan]},
        dim=64,
        num_layers=1,
        num_heads=4,
        feedforward_dim=128,
        dropout=0.0,
        warmup_steps=20,
        schedule="linear",
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3),
    )
    options: dict[str, Any] = {"check_val_every_n_epoch": 50, "num_sanity_val_steps": 0, "gradient_clip_val": 5.0}
    runner = trainer(tmp_path, max_epochs=50, strategy=SingleDevice(techniques=techniques(plan)), **options)
    runner.fit(module, datamodule=source)
    assert runner.callback_metrics["val/f1"] > 0.95
