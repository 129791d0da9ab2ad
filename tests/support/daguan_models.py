"""Small taggers of sentences of numbers, by the contest's three plans."""

from __future__ import annotations

import functools
from typing import Any

import pytorch_lightning as pl
import torch

from kexue.data.daguan_2019 import DaguanDataModule
from kexue.lightning_modules.extraction import DaguanIE
from kexue.strategies import MultiSampleDropout, Technique

PLANS: dict[str, dict[str, Any]] = {
    "crf": {"head": "crf"},
    "crf_multi_sample": {"head": "crf"},
    "span_soft": {"head": "span", "trunk": "convolution", "trunk_layers": 2},
    "span_hard": {"head": "span", "start_label": "hard"},
}
TINY: dict[str, Any] = {"dim": 32, "num_layers": 2, "num_heads": 2, "feedforward_dim": 64, "dropout": 0.0}


def techniques(plan: str) -> list[Technique]:
    """What a plan asks of the strategy."""
    many = MultiSampleDropout(num_samples=5, p=0.5, head="head.emissions", reduction="mean_logits")
    return [many] if plan == "crf_multi_sample" else []


def data(rows: int = 20, batch_size: int = 10, **options: Any) -> DaguanDataModule:
    module = DaguanDataModule(batch_size, num_generated=rows, **options)
    module.setup("fit")
    return module


def model(plan: str, source: DaguanDataModule, **options: Any) -> DaguanIE:
    pl.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=5e-3)
    return DaguanIE(
        **source.model_arguments(), **{**TINY, "trunk_dropout": 0.0, **PLANS[plan], **options}, optimizer=optimizer
    )


def built(plan: str, source: DaguanDataModule, **options: Any) -> DaguanIE:
    module = model(plan, source, **options)
    module.configure_model()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    return module
