"""Small models for named entities, and their way from gold spans to targets and back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from kexue.data.ner import NerDataModule
from kexue.data.records import without_overlaps
from kexue.lightning_modules.extraction import NerCRF, NerGlobalPointer
from kexue.lightning_modules.extraction.ner import inner_places, plain_spans

MODELS = {"ner_crf": NerCRF, "ner_global_pointer": NerGlobalPointer}
TINY: dict[str, Any] = {"dim": 32, "num_layers": 1, "num_heads": 2, "feedforward_dim": 64, "dropout": 0.0}


class Losses(pl.Callback):
    """The losses of all steps."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(outputs["loss"].item())


def data(rows: int = 24, batch_size: int = 8, **options: Any) -> NerDataModule:
    module = NerDataModule(batch_size=batch_size, num_generated=rows, **options)
    module.setup("fit")
    return module


def model(name: str, source: NerDataModule, **options: Any) -> NerCRF | NerGlobalPointer:
    pl.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=3e-3)
    return MODELS[name](**source.model_arguments(), **{**TINY, **options}, optimizer=optimizer)


def built(name: str, source: NerDataModule, **options: Any) -> NerCRF | NerGlobalPointer:
    module = model(name, source, **options)
    module.configure_model()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    return module


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


def gold_scores(name: str, module: Any, batch: dict[str, Any]) -> None:
    """Replace the head's answer by the gold one: what it would find if it knew all."""
    rows, length = batch["ids"].shape
    if name == "ner_crf":
        tags = module.scheme.tags(batch["flat_labels"], length)[:, 1:-1]
        assert (tags[~inner_places(batch)[:, 1:-1]] == 0).all()
        module.head = lambda features, mask, tags_=None: tags
        return
    scores = -torch.ones(rows, len(module.types), length, length)
    row, place = (batch["span_labels"][..., 0] >= 0).nonzero(as_tuple=True)
    scores[(row, *batch["span_labels"][row, place].T)] = 1
    module.head = type("Gold", (), {"compact": staticmethod(lambda *_: scores)})()


def round_trip(name: str, source: NerDataModule) -> int:
    """Gold to targets to decoder to gold, of all rows; the number of spans that the model cannot say."""
    lost = 0
    module = model(name, source)
    for batch in [*source.train_dataloader(), *source.val_dataloader()]:
        gold_scores(name, module, batch)
        for found, gold in zip(module._extract(batch["ids"][..., None], batch), batch["records"], strict=True):
            wanted = gold.spans if module.overlapping else without_overlaps(gold.spans)
            assert (found.id, found.text) == (gold.id, gold.text)
            assert sorted(plain_spans(found)) == sorted({(s.type, s.start, s.end) for s in wanted})
            lost += len(set(gold.spans)) - len(found.spans)
    return lost
