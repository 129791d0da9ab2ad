"""Entity linking on real texts: gold annotations survive the way through targets and decoder, and 100 can be learnt."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from kexue.data.linking import LinkDataModule
from kexue.lightning_modules.extraction.entity_linking import EntityLinker
from kexue.strategies import SingleDevice


@pytest.fixture
def linking(tmp_path: Path) -> LinkDataModule:
    root = os.environ.get("KEXUE_DATA")
    if not root or not (Path(root) / "entity_linking").is_dir():
        pytest.skip("KEXUE_DATA does not name a folder with entity_linking")
    module = LinkDataModule(64, root=root, cache_dir=str(tmp_path))
    module.setup("fit")
    return module


def test_gold_annotations_decode_to_themselves(linking: LinkDataModule) -> None:
    """All 500 of dev; of the 3000 in training two are lost, whose names are pruned: found oftener than meant."""
    module = EntityLinker(**linking.model_arguments())
    module._border_probabilities = lambda _, batch: (batch["labels"] & batch["borders"]).float()  # type: ignore
    module._link = lambda _, batch, chosen: torch.where(batch["right"][chosen], 9.0, -9.0)  # type: ignore
    collate = linking.collator()
    lost: list[str] = []
    for split in ("train", "val"):
        rows: Any = linking.records(split)
        for first in range(0, len(rows), 100):
            batch = collate(rows[first : first + 100])
            for found, gold in zip(module._extract(torch.zeros(1, 1, 1), batch), batch["records"], strict=True):
                assert set(found.links) <= set(gold.links)
                lost += [link.text for link in gold.links if link not in found.links]
    assert lost == ["开始", "颜色"]
    assert set(lost) <= set(collate.lexicon.pruned)


@pytest.mark.slow
def test_100_texts_are_learnt_by_heart(linking: LinkDataModule, tmp_path: Path) -> None:
    rows = linking.records("train")[:100]
    linking.set_records("train", rows)
    linking.set_records("val", rows)
    linking.batch_size = 16
    pl.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.Adam, lr=3e-3)
    module = EntityLinker(**linking.model_arguments(), dim=64, dropout=0.0, optimizer=optimizer)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        strategy=SingleDevice(),
        devices=1,
        max_epochs=20,
        check_val_every_n_epoch=20,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=linking)
    assert trainer.callback_metrics["val/f1"] > 0.95
