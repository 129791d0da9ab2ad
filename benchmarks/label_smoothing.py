"""What label smoothing does to error and calibration: small pictures, few of them, several seeds.

Each seed draws 500 of the 2,300 pictures of the CIFAR-10 sample, trains a small residual network on them twice, with
and without smoothing from the same start on the same batches, and tests both with the plain loss on 1,000 others. So it
does with the pictures as they are, which the network comes to know by heart, and with pictures shifted and mirrored
anew each time. The spread given is the standard error over seeds; in each third line, of the differences within seeds.
The plot has loss and error by epoch; its losses are plain in training as well, since smoothed ones do not compare.

The expected calibration error is the mean distance of confidence and accuracy in bins of confidence; `scaled` is the
loss after dividing the scores by the one temperature that suits the test pictures best, which leaves of calibration
what no single number can mend.

    KEXUE_DATA=FOLDER python benchmarks/label_smoothing.py [--json FILE] [--plot FILE] [--seeds 3] [--epochs 32]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import report
from pictures import cifar10
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.nn.losses import smoothed_cross_entropy, smoothing_floor
from kexue.nn.residual import ResidualNetwork

CLASSES, TRAIN, TEST, BATCH, RATE, BINS = 10, 500, 1000, 25, 0.1, 15
EVERY = 4  # epochs between two tests
SMOOTHINGS = (0.0, 0.1)
KINDS = [(augment, smoothing) for augment in (False, True) for smoothing in SMOOTHINGS]
CURVES = {
    "training": "Training loss, plain, of the epoch",
    "loss": "Test loss, plain",
    "error": "Test error (%)",
}
Kind = tuple[bool, float]
Tested = dict[Kind, tuple[Tensor, Tensor]]
Curves = dict[Kind, list[dict[str, list[float]]]]


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture shifted by up to 4 pixels, half of them mirrored."""
    count = len(images)
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(32), left + torch.arange(32)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns[mirrored] = columns[mirrored].flip(1)
    return padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    training: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], kind: Kind, seed: int, epochs: int
) -> tuple[nn.Module, dict[str, list[float]]]:
    """A trained network; the plain loss of each epoch, and loss and error on the test pictures of some."""
    augment, smoothing = kind
    images, classes = training
    torch.manual_seed(seed)
    body = ResidualNetwork(3, 16, 1)
    net = nn.Sequential(body, nn.Linear(body.dim, CLASSES))
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    curves: dict[str, list[float]] = {key: [] for key in CURVES}
    for epoch in range(1, epochs + 1):
        losses = []
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            batch = augmented(images[rows], generator) if augment else images[rows]
            scores = net(batch)
            loss = smoothed_cross_entropy(scores, classes[rows], smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(float(F.cross_entropy(scores.detach(), classes[rows])))
        curves["training"].append(statistics.fmean(losses))
        if epoch % EVERY == 0:
            scores = scores_of(net, test[0])
            curves["loss"].append(float(F.cross_entropy(scores, test[1])))
            curves["error"].append(100 * float((scores.argmax(1) != test[1]).double().mean()))
    return net.eval(), curves


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


def run(images: Tensor, classes: Tensor, seeds: int, epochs: int) -> tuple[list[dict[str, Any]], Tested, Curves]:
    """A row for each run, the test scores and classes of all seeds, and what happened by epoch."""
    rows: list[dict[str, Any]] = []
    parts: dict[Kind, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in KINDS}
    curves: Curves = {kind: [] for kind in KINDS}
    for seed in range(seeds):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        test, training = ((images[part], classes[part]) for part in (order[:TEST], order[TEST : TEST + TRAIN]))
        for kind in KINDS:
            net, found = train(training, test, kind, seed, epochs)
            at_training = measure(net, *training)
            row: dict[str, Any] = {"augmented": kind[0], "smoothing": kind[1], "seed": seed}
            row |= measure(net, *test)
            row |= {"training error": at_training["error"], "training confidence": at_training["confidence"]}
            rows.append(row)
            parts[kind].append((scores_of(net, test[0]), test[1]))
            curves[kind].append(found)
            print(" ".join(f"{key}={value:.4g}" for key, value in row.items()), file=sys.stderr, flush=True)
    tested = {kind: (torch.cat([p[0] for p in ps]), torch.cat([p[1] for p in ps])) for kind, ps in parts.items()}
    return rows, tested, curves


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


def draw(path: str, tested: Tested, curves: Curves, note: str) -> None:
    """Loss and error by epoch, means over seeds in bands from the smallest to the largest; accuracy by confidence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 4, figsize=(19, 4.4), layout="constrained")
    panels[3].plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    for augment, smoothing in KINDS:
        style: dict[str, Any] = {
            "color": "tab:blue" if smoothing else "tab:orange",
            "linestyle": "--" if augment else "-",
            "label": f"smoothing {smoothing:g}" + (", augmented" if augment else ""),
        }
        for panel, key in zip(panels[:3], CURVES, strict=True):
            by_epoch = list(zip(*(found[key] for found in curves[augment, smoothing]), strict=True))
            step = 1 if key == "training" else EVERY
            epochs = range(step, step * len(by_epoch) + 1, step)
            panel.plot(epochs, [statistics.fmean(values) for values in by_epoch], **style)
            low, high = ([end(values) for values in by_epoch] for end in (min, max))
            panel.fill_between(epochs, low, high, color=style["color"], alpha=0.1, linewidth=0)
        bins = reliability(*tested[augment, smoothing])
        panels[3].plot([b[1] for b in bins], [b[2] for b in bins], marker=".", **style)
    for panel, title in zip(panels, (*CURVES.values(), "Test pictures of all seeds, by confidence"), strict=True):
        panel.set(xlabel="epoch", title=title)
        panel.grid(alpha=0.3)
    panels[3].set(xlabel="confidence", ylabel="accuracy")
    panels[0].legend()
    figure.suptitle(note, fontsize=10)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=32)
    arguments = parser.parse_args()
    root = os.environ.get("KEXUE_DATA") or parser.error("set KEXUE_DATA to the folder of the data sets")
    pixels, classes = cifar10(Path(root))
    start = time.process_time()
    pixels = (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    rows, tested, curves = run(pixels, classes, arguments.seeds, arguments.epochs)
    minutes = (time.process_time() - start) / 60
    note = (
        f"CIFAR-10, {TRAIN} pictures, {arguments.epochs} epochs, {arguments.seeds} seeds, "
        f"floor of the smoothed loss {smoothing_floor(CLASSES):.3f}, {minutes:.0f} minutes of one core"
    )
    report(f"Label smoothing: {note}", summary(rows), arguments.json)
    if arguments.plot:
        draw(arguments.plot, tested, curves, f"{note}; bands: smallest to largest over the seeds")


if __name__ == "__main__":
    main()
