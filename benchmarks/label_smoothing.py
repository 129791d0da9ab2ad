"""What label smoothing does to error and calibration: small pictures, few of them, several seeds.

Each seed draws 500 of the 2,300 pictures of the CIFAR-10 sample, trains a small residual network on them twice, with
and without smoothing from the same start on the same batches, and tests both with the plain loss on 1,000 others. So it
does with the pictures as they are, which the network comes to know by heart, and with pictures shifted and mirrored
anew each time. The spread given is the standard error over seeds; in each third line, of the differences within seeds.

The expected calibration error is the mean distance of confidence and accuracy in bins of confidence; `scaled` is the
loss after dividing the scores by the one temperature that suits the test pictures best, which leaves of calibration
what no single number can mend.

    KEXUE_DATA=FOLDER python benchmarks/label_smoothing.py [--json FILE] [--plot FILE] [--seeds 4] [--epochs 40]
"""

from __future__ import annotations

import argparse
import io
import math
import os
import statistics
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.nn.losses import smoothed_cross_entropy, smoothing_floor
from kexue.nn.residual import ResidualNetwork

CLASSES, TRAIN, TEST, BATCH, RATE, BINS = 10, 500, 1000, 25, 0.1, 15
SMOOTHINGS = (0.0, 0.1)
KINDS = [(augment, smoothing) for augment in (False, True) for smoothing in SMOOTHINGS]
Tested = dict[tuple[bool, float], tuple[Tensor, Tensor]]


def pictures(root: Path) -> tuple[Tensor, Tensor]:
    """Pictures `(N, 3, 32, 32)` in -1..1 and classes `(N,)`."""
    from PIL import Image

    images, names = [], []
    for part in ("train", "dev"):
        with zipfile.ZipFile(root / "cifar10" / f"cifar10_{part}.zip") as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".jpg"):
                    images.append(np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
                    names.append(name.split("/")[-2])
    classes = sorted(set(names))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return pixels / 127.5 - 1, torch.tensor([classes.index(name) for name in names])


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture shifted by up to 4 pixels, half of them mirrored."""
    count = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(32), left + torch.arange(32)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(images: Tensor, classes: Tensor, smoothing: float, augment: bool, seed: int, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    body = ResidualNetwork(3, 16, 1)
    net = nn.Sequential(body, nn.Linear(body.dim, CLASSES))
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            batch = augmented(images[rows], generator) if augment else images[rows]
            loss = smoothed_cross_entropy(net(batch), classes[rows], smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    return net.eval()


@torch.no_grad()
def scores_of(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(part) for part in images.split(200)]).double()


def reliability(scores: Tensor, classes: Tensor) -> list[tuple[float, float, float]]:
    """Share of the pictures, mean confidence and accuracy in each bin of confidence that is not empty."""
    confidence, predicted = scores.softmax(1).max(1)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    right = (predicted == classes).double()
    chosen = [bins == number for number in range(BINS)]
    return [(float(c.double().mean()), float(confidence[c].mean()), float(right[c].mean())) for c in chosen if c.any()]


def best_temperature_loss(scores: Tensor, classes: Tensor) -> float:
    return min(float(F.cross_entropy(scores / 1.05**power, classes)) for power in range(-30, 60))


def measure(net: nn.Module, images: Tensor, classes: Tensor) -> dict[str, float]:
    scores = scores_of(net, images)
    return {
        "error": float((scores.argmax(1) != classes).double().mean()),
        "loss": float(F.cross_entropy(scores, classes)),
        "scaled": best_temperature_loss(scores, classes),
        "calibration error": sum(share * abs(sure - right) for share, sure, right in reliability(scores, classes)),
        "confidence": float(scores.softmax(1).amax(1).mean()),
    }


def run(images: Tensor, classes: Tensor, seeds: int, epochs: int) -> tuple[list[dict[str, Any]], Tested]:
    """A row for each run, and the test scores and classes of all seeds."""
    rows: list[dict[str, Any]] = []
    parts: dict[tuple[bool, float], list[tuple[Tensor, Tensor]]] = {kind: [] for kind in KINDS}
    for seed in range(seeds):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        test, training = order[:TEST], order[TEST : TEST + TRAIN]
        for augment, smoothing in KINDS:
            net = train(images[training], classes[training], smoothing, augment, seed, epochs)
            at_training = measure(net, images[training], classes[training])
            row: dict[str, Any] = {"augmented": augment, "smoothing": smoothing, "seed": seed}
            row |= measure(net, images[test], classes[test])
            row |= {"training error": at_training["error"], "training confidence": at_training["confidence"]}
            rows.append(row)
            parts[augment, smoothing].append((scores_of(net, images[test]), classes[test]))
            print(" ".join(f"{key}={value:.4g}" for key, value in row.items()), file=sys.stderr, flush=True)
    return rows, {kind: (torch.cat([p[0] for p in ps]), torch.cat([p[1] for p in ps])) for kind, ps in parts.items()}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over seeds, for each kind of run and for the differences that smoothing makes."""
    lines = []
    keys = [key for key in rows[0] if key not in ("augmented", "smoothing", "seed")]
    for augment in (False, True):
        plain, smoothed = (of_kind(rows, (augment, smoothing)) for smoothing in SMOOTHINGS)
        differences = [{key: b[key] - a[key] for key in keys} for a, b in zip(plain, smoothed, strict=True)]
        for name, found in (*zip(SMOOTHINGS, (plain, smoothed), strict=True), ("difference", differences)):
            columns = {key: _mean_and_error([row[key] for row in found]) for key in keys}
            lines.append({"pictures": "augmented" if augment else "as they are", "smoothing": str(name), **columns})
    return lines


def of_kind(rows: list[dict[str, Any]], kind: tuple[bool, float]) -> list[dict[str, Any]]:
    return [row for row in rows if (row["augmented"], row["smoothing"]) == kind]


def _mean_and_error(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def draw(path: str, rows: list[dict[str, Any]], tested: Tested) -> None:
    """Accuracy against confidence, and what each seed gave."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    left.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    for augment, smoothing in KINDS:
        style: dict[str, Any] = {
            "color": "tab:blue" if smoothing else "tab:orange",
            "linestyle": ":" if augment else "-",
            "marker": "o",
            "label": f"smoothing {smoothing}" + (", augmented" if augment else ""),
        }
        bins = reliability(*tested[augment, smoothing])
        left.plot([b[1] for b in bins], [b[2] for b in bins], **style)
        for axes, key in ((middle, "error"), (right, "loss")):
            values = [row[key] for row in of_kind(rows, (augment, smoothing))]
            axes.plot(values, **style)
            axes.set(xlabel="seed", xticks=range(len(values)), title=f"Test {key}", ylim=(0, None))
    left.set(xlabel="confidence", ylabel="accuracy", title="Test pictures of all seeds, by confidence")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    root = os.environ.get("KEXUE_DATA") or parser.error("set KEXUE_DATA to the folder of the data sets")
    rows, tested = run(*pictures(Path(root)), arguments.seeds, arguments.epochs)
    name = f"Label smoothing: {arguments.seeds} seeds, floor of the smoothed loss {smoothing_floor(CLASSES):.3f}"
    report(name, summary(rows), arguments.json)
    if arguments.plot:
        draw(arguments.plot, rows, tested)


if __name__ == "__main__":
    main()
