"""Named entities of CLUENER, Resume and Weibo: annotations survive the way through the targets, and can be learnt."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ner_models import MODELS, round_trip, trainer

from kexue.data.ner import NerDataModule

FILES = {
    "cluener": ("train.json.gz", "dev.json"),
    "resume": ("train.char.bmes.gz", "dev.char.bmes"),
    "weibo": ("weiboNER_2nd_conll.train.gz", "weiboNER_2nd_conll.dev"),
}


def real(name: Any, **options: Any) -> NerDataModule:
    root = os.environ.get("KEXUE_DATA")
    if not root or not Path(root, f"ner_{name}").is_dir():
        pytest.skip(f"KEXUE_DATA does not name a folder with ner_{name}")
    train, dev = (f"ner_{name}/{file}" for file in FILES[name])
    module = NerDataModule(8, root=root, format=name, train_file=train, dev_file=dev, **options)
    module.setup("fit")
    return module


@pytest.mark.parametrize("options", [{}, {"max_length": 66, "stride": 32}], ids=["whole", "windows"])
@pytest.mark.parametrize("name", FILES)
def test_gold_annotations_decode_to_themselves(name: str, options: dict[str, Any]) -> None:
    """Tags cannot say two companies in the name of a book (CLUENER), and windows of 64 with 33 in common miss none."""
    source = real(name, **options)
    assert round_trip("ner_global_pointer", source) == 0
    assert round_trip("ner_crf", source) == (2 if name == "cluener" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_60_texts_are_learnt_by_heart(model: str, tmp_path: Path) -> None:
    source = real("cluener")
    rows = source.records("train")[:60]
    source.set_records("train", rows)
    source.set_records("val", rows)
    pl.seed_everything(0, verbose=False)
    module = MODELS[model](
        **source.model_arguments(),
        dim=96,
        num_layers=2,
        num_heads=4,
        feedforward_dim=192,
        dropout=0.0,
        warmup_steps=30,
        schedule="linear",
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01),
    )
    runner = trainer(tmp_path, max_epochs=40, gradient_clip_val=1.0, check_val_every_n_epoch=40, num_sanity_val_steps=0)
    runner.fit(module, datamodule=source)
    assert runner.callback_metrics["val/f1"] > 0.95
