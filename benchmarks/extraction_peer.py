"""Our heads beside bert4torch's, for named entities and relations, on the same small encoder, data, steps and seeds.

Theirs: its CRF over BIO tags without rules; its pointers with its sparse loss, one of spans or the three of GPLinker.
All else is the experiment's: `relation_extraction_duie` for duie, `ner_SET` for the others.

    pip install --no-deps bert4torch==0.5.3 torch4keras==0.2.8 six     # newer ones need torchvision
    KEXUE_DATA=FOLDER python benchmarks/extraction_peer.py --set weibo [--seeds 42 43] [--json FILE] [KEY=VALUE ...]
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
from kexue.lightning_modules.extraction import NerCRF, NerGlobalPointer, RelationGPLinker
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


def their_pointer(kind: str, *arguments: Any, **options: Any) -> nn.Module:
    """One of its pointers, asked as ours is."""
    return Asked({"efficient": EfficientGlobalPointer, "standard": GlobalPointer}[kind](*arguments, **options))


class Asked(nn.Module):
    """Their pointer under the names that ours has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def compact(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores `(B, H, T, T)`."""
        return self.inner(features, None if mask is None else mask.long())


def their_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Its sparse multi-label loss; labels `(B, K, 3)`: head, first and last token, -1 where there is none."""
    rows, heads, length, _ = scores.shape
    cells = torch.zeros(rows, heads, labels.shape[1], dtype=torch.long, device=labels.device)
    row, place = (labels[..., 0] >= 0).nonzero(as_tuple=True)
    kind, first, last = labels[row, place].T
    cells[row, kind, place] = first * length + last
    return SparseMultilabelCategoricalCrossentropy(mask_zero=True)(scores.flatten(2), cells).sum(1).mean()


class TheirPointer(NerGlobalPointer):
    def make_head(self) -> Any:
        return their_pointer(self.head_kind, self.config.dim, len(self.types), self.head_size)

    def losses(self, features: Tensor, batch: dict[str, Any], training: bool) -> dict[str, Tensor]:
        return {"spans": their_loss(self.head.compact(features, batch["mask"]), batch["span_labels"])}


class TheirGPLinker(RelationGPLinker):
    def make_head(self) -> Any:
        pointers = super().make_head()
        sizes = {name: pointer.num_heads for name, pointer in pointers.items()}
        for name, heads in sizes.items():
            links = {} if name == "entities" else {"RoPE": False, "tril_mask": False}
            pointers[name] = their_pointer(self.head_kind, self.config.dim, heads, self.head_size, **links)
        return pointers

    def task_losses(self, features: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self._losses(self.head(features, batch["mask"]), batch, their_loss)  # type: ignore[arg-type]


SYSTEMS: dict[str, tuple[str, type[pl.LightningModule], dict[str, Any]]] = {
    "ner_crf": ("ner_crf", NerCRF, {}),
    "bert4torch CRF": ("ner_crf", TheirCRF, {"scheme": "BIO", "constrained": False}),
    "ner_global_pointer": ("ner_global_pointer", NerGlobalPointer, {}),
    "bert4torch GlobalPointer": ("ner_global_pointer", TheirPointer, {}),
    "gplinker_relation": ("gplinker_relation", RelationGPLinker, {}),
    "bert4torch GPLinker": ("gplinker_relation", TheirGPLinker, {}),
}


def train(system: str, dataset: str, seed: int, overrides: list[str]) -> tuple[float, float]:
    """F1 on the dev rows after the last epoch, and the minutes of processor time."""
    name, kind, options = SYSTEMS[system]
    experiment = "relation_extraction_duie" if dataset == "duie" else f"ner_{dataset}"
    words = [f"experiment={experiment}", f"model={name}", f"seed={seed}", "trainer.enable_progress_bar=false"]
    with tempfile.TemporaryDirectory() as folder:
        config = plain(compose_run([*words, *overrides]), folder)
        pl.seed_everything(seed, verbose=False)
        data = session.make_data(config, None)
        node = {**config["model"], **data.model_arguments(), **options}
        node["optimizer"] = build(node["optimizer"], "model.optimizer")
        del node["_target_"]
        model = kind(**node)
        trainer = session.make_trainer(config, folder, strategy=SingleDevice())  # type: ignore[arg-type]
        begin = time.process_time()
        trainer.fit(model, datamodule=data)
        minutes = (time.process_time() - begin) / 60
        return float(trainer.callback_metrics["val/f1"]), minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=["cluener", "resume", "weibo", "duie"], default="weibo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", default="", help="systems whose name contains this")
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    if "KEXUE_DATA" not in os.environ:
        parser.error("set KEXUE_DATA to the folder of the data sets")
    rows = []
    for system, (name, _, _) in SYSTEMS.items():
        if (name == "gplinker_relation") != (options.set == "duie") or options.only not in system:
            continue
        found = []
        for seed in options.seeds:
            found.append(train(system, options.set, seed, options.overrides))
            print(f"{system}, seed {seed}: F1 {found[-1][0]:.4f} in {found[-1][1]:.1f} minutes", flush=True)
        f1, spread = median_and_spread([score for score, _ in found])
        minutes = sum(part for _, part in found) / len(found)
        rows.append({"system": system, "dev F1": f1, "spread": spread, "processor minutes": minutes})
    report(f"{options.set}: our heads beside bert4torch's", rows, options.json)


if __name__ == "__main__":
    main()
