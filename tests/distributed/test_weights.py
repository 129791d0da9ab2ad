"""Published weights under ZeRO stage 3: read inside `configure_model`, straight into shards."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from cells import Rows, full_weights, make_strategy
from ranks import run_ranks
from torch import Tensor
from torch.utils.data import DataLoader

from kexue.nn.transformer import Transformer, TransformerConfig, from_pretrained, to_pretrained


class Loaded(pl.LightningModule):
    """A module that reads its weights where modules are to be built, and keeps them as they are."""

    def __init__(self, folder: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: Transformer | None = None
        self.cut = False

    def configure_model(self) -> None:
        if self.net is None:
            self.net = from_pretrained(self.hparams["folder"], heads=(), **self.hparams["options"])
            self.cut = hasattr(next(self.net.parameters()), "ds_shape")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.net is not None
        return self.net(batch["ids"]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def load_all(folder: str, cases: list[dict[str, Any]]) -> list[tuple[bool, dict[str, Any]]]:
    warnings.filterwarnings("ignore")
    results = []
    for options in cases:
        model = Loaded(folder, options)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=make_strategy("zero_3", []),
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(Rows(4), batch_size=2))
        results.append((model.cut, full_weights(model)))
    return results


def test_shards_are_filled(tmp_path: Path) -> None:
    config = TransformerConfig(
        vocab_size=50,
        dim=16,
        num_layers=2,
        num_heads=2,
        feedforward_dim=20,
        embedding_dim=8,
        num_segments=2,
        positions="learned",
        norm="post",
        sharing="all",
        heads=("pooler", "sentence", "masked_lm"),
        dropout=0.0,
    )
    torch.manual_seed(0)
    saved = Transformer(config)
    to_pretrained(saved, tmp_path)
    cases = [{}, {"unshare": True}]
    expected = [from_pretrained(tmp_path, heads=(), **options) for options in cases]
    for results in run_ranks(load_all, 2, str(tmp_path), cases):
        for (cut, weights), module in zip(results, expected, strict=True):
            assert cut
            assert weights.keys() == {f"net.{name}" for name, _ in module.named_parameters()}
            for name, parameter in module.named_parameters():
                assert torch.equal(torch.from_numpy(weights[f"net.{name}"]), parameter), name
