"""Our heads for named entities beside bert4torch's, on the same small encoder, data, steps and seeds.

Theirs: its CRF over BIO tags without rules, its GlobalPointer with its sparse loss. All else is the experiment's.

    pip install --no-deps bert4torch==0.5.3 torch4keras==0.2.8 six     # newer ones need torchvision
    KEXUE_DATA=FOLDER python benchmarks/ner_peer.py --set weibo [--seeds 42 43] [--json FILE] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

import pytorch_lightning as pl
import torch
from bert4torch.layers.crf import CRF
from bert4torch.layers.global_point import EfficientGlobalPointer, GlobalPointer
from bert4torch.losses import SparseMultilabelCategoricalCrossentropy
from common import median_and_spread, report
from torch import Tensor, nn

from kexue.cli import session
from kexue.cli.config import compose_run, plain
from kexue.cli.targets import build
from kexue.lightning_modules.extraction import NerCRF, NerGlobalPointer
from kexue.strategies import SingleDevice


class TheirTagHead(nn.Module):
    """Emissions and bert4torch's CRF, asked as ours is."""

    def __init__(self, dim: int, num_tags: int) -> None:
        super().__init__()
        self.emissions = nn.Linear(dim, num_tags)
        self.crf = CRF(num_tags)

    def forward(self, features: Tensor, mask: Tensor, tags: Tensor | None = None) -> Tensor:
        """Losses `(W,)`, or best tags `(W, T)`."""
        emissions = self.emissions(features)
        if tags is not None:
            return self.crf(emissions, mask, tags, reduction="none")
        return self.crf.decode(emissions, mask, pad_tag=0)  # type: ignore[return-value]


class TheirCRF(NerCRF):
    def make_head(self) -> Any:
        return TheirTagHead(self.config.dim, self.scheme.num_tags)


class TheirPointer(NerGlobalPointer):
    def make_head(self) -> Any:
        kind = EfficientGlobalPointer if self.head_kind == "efficient" else GlobalPointer
        return kind(self.config.dim, len(self.types), self.head_size)

    def losses(self, features: Tensor, batch: dict[str, Any], training: bool) -> dict[str, Tensor]:
        scores = self.head(features, batch["mask"].long())
        rows, heads, length, _ = scores.shape
        labels = batch["span_labels"]
        cells = torch.zeros(rows, heads, labels.shape[1], dtype=torch.long, device=labels.device)
        row, place = (labels[..., 0] >= 0).nonzero(as_tuple=True)
        kind, first, last = labels[row, place].T
        cells[row, kind, place] = first * length + last
        loss = SparseMultilabelCategoricalCrossentropy(mask_zero=True)(scores.flatten(2), cells)
        return {"spans": loss.sum(1).mean()}

    def find(self, features: Tensor, batch: dict[str, Any]) -> Any:
        head, self.head = self.head, _Compact(self.head)
        try:
            return super().find(features, batch)
        finally:
            self.head = head


class _Compact(nn.Module):
    """Their pointer under the name that ours has."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.inner = head

    def compact(self, features: Tensor, mask: Tensor) -> Tensor:
        return self.inner(features, mask.long())


SYSTEMS: dict[str, tuple[str, type[pl.LightningModule], dict[str, Any]]] = {
    "ner_crf": ("ner_crf", NerCRF, {}),
    "bert4torch CRF": ("ner_crf", TheirCRF, {"scheme": "BIO", "constrained": False}),
    "ner_global_pointer": ("ner_global_pointer", NerGlobalPointer, {}),
    "bert4torch GlobalPointer": ("ner_global_pointer", TheirPointer, {}),
}


def train(system: str, dataset: str, seed: int, overrides: list[str]) -> tuple[float, float]:
    """F1 on the dev rows after the last epoch, and the minutes."""
    name, kind, options = SYSTEMS[system]
    words = [f"experiment=ner_{dataset}", f"model={name}", f"seed={seed}", "trainer.enable_progress_bar=false"]
    with tempfile.TemporaryDirectory() as folder:
        config = plain(compose_run([*words, *overrides]), folder)
        pl.seed_everything(seed, verbose=False)
        data = session.make_data(config, None)
        node = {**config["model"], **data.model_arguments(), **options}
        node["optimizer"] = build(node["optimizer"], "model.optimizer")
        del node["_target_"]
        model = kind(**node)
        trainer = session.make_trainer(config, folder, strategy=SingleDevice())  # type: ignore[arg-type]
        begin = time.perf_counter()
        trainer.fit(model, datamodule=data)
        minutes = (time.perf_counter() - begin) / 60
        return float(trainer.callback_metrics["val/f1"]), minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=["cluener", "resume", "weibo"], default="weibo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if "KEXUE_DATA" not in os.environ:
        parser.error("set KEXUE_DATA to the folder of the data sets")
    rows = []
    for system in SYSTEMS:
        found = []
        for seed in options.seeds:
            found.append(train(system, options.set, seed, options.overrides))
            print(f"{system}, seed {seed}: F1 {found[-1][0]:.4f} in {found[-1][1]:.1f} minutes", flush=True)
        f1, spread = median_and_spread([score for score, _ in found])
        rows.append(
            {"system": system, "dev F1": f1, "spread": spread, "minutes": sum(part for _, part in found) / len(found)}
        )
    report(f"named entities of {options.set}, our heads beside bert4torch's", rows, options.json)


if __name__ == "__main__":
    main()
