"""Multi-sample dropout: loss and error by epoch for different numbers of samples, and what the samples cost.

Pictures: a small residual network on CIFAR-10, 1,000 pictures to train on and 1,300 to test on, no augmentation. Per
seed, all runs start from the same weights and see the same batches. The error of 1,300 pictures, a mean over the seeds,
has a standard error of about 0.8 points; the spread beside it is the deviation over the seeds. Cost: a training step of
a Transformer encoder, its FLOPs counted and its time measured in turn with the same step without the technique.

    KEXUE_DATA=FOLDER python benchmarks/multi_sample_dropout.py [--json FILE] [--plot FILE] [--epochs 20] [--seeds 3]
        [--label-smoothing 0.1]
    python benchmarks/multi_sample_dropout.py --part cost [--json FILE]

The pictures take 7 minutes of one core. With label smoothing the training loss is the smoothed one, at least 0.500; the
test loss is plain.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import add_device, device, in_turn, median_and_spread, now, report, use_device
from pictures import cifar10
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kexue.nn.residual import ResidualNetwork
from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.strategies import MultiSampleDropout, multi_sample_dropout, multi_sample_loss
from kexue.strategies.multi_sample_dropout import Reduction

TRAIN, BATCH, RATE, P = 1000, 50, 2e-3, 0.5
EVERY = 2  # epochs between two tests
RUNS: dict[str, tuple[int, Reduction]] = {
    "no dropout": (0, "mean_loss"),
    "1 sample": (1, "mean_loss"),
    "2 samples": (2, "mean_loss"),
    "4 samples": (4, "mean_loss"),
    "8 samples": (8, "mean_loss"),
    "8 samples, mean logits": (8, "mean_logits"),
}
DIM, LAYERS, TOKENS, CLASSES = 384, 6, 128, 13


def pictures(folder: Path) -> tuple[Tensor, Tensor]:
    """All pictures `(N, 3, 32, 32)`, standardised, and their classes `(N,)`, in an order that is drawn once."""
    x, labels = cifar10(folder)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    return x[order].contiguous(memory_format=torch.channels_last), labels[order]


def learn(
    data: tuple[Tensor, Tensor], samples: int, reduction: Reduction, epochs: int, seed: int, smoothing: float
) -> dict[str, list[float]]:
    """The training loss of each epoch, and test loss and error of every second."""
    torch.manual_seed(seed)
    trunk = ResidualNetwork(3, 16, 1)
    net = nn.ModuleList([trunk, nn.Linear(trunk.dim, 10)])
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE, fused=True)
    generator = torch.Generator().manual_seed(seed)
    x, y = data
    curves: dict[str, list[float]] = {"train": [], "test": [], "error": []}

    def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=smoothing)

    for epoch in range(1, epochs + 1):
        losses = []
        for rows in torch.randperm(TRAIN, generator=generator).split(BATCH):
            features = net[0](x[rows])
            if samples:
                features = multi_sample_dropout(features, samples, P)
            loss = multi_sample_loss(loss_fn, net[1](features), y[rows], reduction)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves["train"].append(statistics.fmean(losses))
        if epoch % EVERY == 0:
            with torch.no_grad():
                logits = torch.cat([net[1](net[0](part)) for part in x[TRAIN:].split(100)])
            curves["test"].append(F.cross_entropy(logits, y[TRAIN:]).item())
            curves["error"].append(100 * (logits.argmax(-1) != y[TRAIN:]).float().mean().item())
    return curves


def mean_curve(runs: Sequence[dict[str, list[float]]], key: str) -> list[float]:
    """The mean over seeds."""
    return [statistics.fmean(values) for values in zip(*(run[key] for run in runs), strict=True)]


def summary(curves: dict[str, list[dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """One row for each kind of run."""
    target = min(mean_curve(curves["1 sample"], "error"))
    rows = []
    for name, runs in curves.items():
        error = mean_curve(runs, "error")
        reached = [EVERY * (place + 1) for place, value in enumerate(error) if value <= target]
        best = [min(run["error"]) for run in runs]
        rows.append(
            {
                "run": name,
                "best error %": min(error),
                "spread over seeds": statistics.stdev(best) if len(best) > 1 else 0.0,
                "last error %": error[-1],
                "best test loss": min(mean_curve(runs, "test")),
                "last training loss": mean_curve(runs, "train")[-1],
                "epochs to the best error of 1 sample": reached[0] if reached else "-",
            }
        )
    return rows


def draw(path: str, curves: dict[str, list[dict[str, list[float]]]], note: str) -> None:
    """Training loss, test loss and test error by epoch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    titles = {"train": "Training loss", "test": "Test loss, without dropout", "error": "Test error (%)"}
    colours = ["grey", "tab:orange", "tab:olive", "tab:green", "tab:blue", "tab:purple"]
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for (name, runs), colour in zip(curves.items(), colours, strict=True):
            mean = mean_curve(runs, key)
            step = 1 if key == "train" else EVERY
            epochs = range(step, step * len(mean) + 1, step)
            panel.plot(epochs, mean, "--" if "logits" in name else "-", color=colour, label=name)
            low, high = (
                [end(values) for values in zip(*(run[key] for run in runs), strict=True)] for end in (min, max)
            )
            panel.fill_between(epochs, low, high, color=colour, alpha=0.1, linewidth=0)
        panel.set(xlabel="epoch", title=title)
        panel.grid(alpha=0.3)
    panels[1].set_ylim(None, 1.15 * panels[1].lines[1].get_ydata().max())
    panels[0].legend()
    figure.suptitle(note, fontsize=10)
    figure.savefig(path, dpi=110)


class Encoder(pl.LightningModule):
    """A Transformer encoder with a linear head, on the mean of the tokens or on every token."""

    def __init__(self, of_tokens: bool) -> None:
        super().__init__()
        config = TransformerConfig(
            1000, DIM, num_layers=LAYERS, num_heads=6, feedforward_dim=4 * DIM, dropout=0.1, max_length=TOKENS
        )
        self.encoder = Transformer(config)
        self.head = nn.Linear(DIM, CLASSES)
        self.of_tokens = of_tokens

    def task_losses(self, features: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"class": F.cross_entropy(self.head(features).flatten(0, -2), batch[1].flatten())}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden = self.encoder(batch[0])
        return self.task_losses(hidden if self.of_tokens else hidden.mean(1), batch)["class"]


def costs(repeats: int, rows: int) -> list[dict[str, Any]]:
    """FLOPs and time of a step without and with samples, for a head on sentences and one on tokens."""
    table = []
    for head, of_tokens in (("on sentences", False), ("on tokens", True)):
        steps = {}
        for samples in (0, 1, 8):
            torch.manual_seed(0)
            module = Encoder(of_tokens).to(device())
            if samples:
                MultiSampleDropout(samples, P).attach(module)
            optimizer = torch.optim.AdamW(module.parameters(), fused=True)
            shape = (rows, TOKENS) if of_tokens else (rows,)
            with device():
                batch = torch.randint(0, 1000, (rows, TOKENS)), torch.randint(0, CLASSES, shape)

            def step(module: Encoder = module, optimizer: Any = optimizer, batch: Any = batch) -> float:
                start = now()
                optimizer.zero_grad()
                module.training_step(batch, 0).backward()
                optimizer.step()
                return now() - start

            step()
            with FlopCounterMode(display=False) as counter:
                step()
            steps[samples] = step, counter.get_total_flops()
        seconds = in_turn({str(samples): step for samples, (step, _) in steps.items()}, repeats)
        for samples, (_, flops) in steps.items():
            median, spread = median_and_spread(seconds[str(samples)])
            # Each step against the plain one of the same turn, so that a slow spell of the machine hits both.
            ratios = [a / b for a, b in zip(seconds[str(samples)], seconds["0"], strict=True)]
            table.append(
                {
                    "head": head,
                    "samples": samples or "none",
                    "GFLOP": flops / 1e9,
                    "times the FLOPs": round(flops / steps[0][1], 4),
                    "seconds": median,
                    "+-": spread,
                    "times the time": statistics.median(ratios),
                }
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8, help="sentences in a batch of the encoder")
    parser.add_argument("--part", choices=("pictures", "cost"), default="pictures")
    add_device(parser)
    arguments = parser.parse_args()
    use_device(arguments.device)

    if arguments.part == "cost":
        size = f"{LAYERS} layers of {DIM}, {arguments.rows} x {TOKENS} tokens, p {P}"
        report(
            f"Multi-sample dropout: cost of a step, {size}", costs(arguments.repeats, arguments.rows), arguments.json
        )
    else:
        if "KEXUE_DATA" not in os.environ:
            raise SystemExit("set KEXUE_DATA to the folder of real data, which holds cifar10")
        data = pictures(Path(os.environ["KEXUE_DATA"]))
        start = time.process_time()
        curves: dict[str, list[dict[str, list[float]]]] = {name: [] for name in RUNS}
        for seed in range(arguments.seeds):
            for name, (samples, reduction) in RUNS.items():
                curves[name].append(learn(data, samples, reduction, arguments.epochs, seed, arguments.label_smoothing))
        minutes = (time.process_time() - start) / 60
        note = (
            f"CIFAR-10, {TRAIN} pictures, {arguments.epochs} epochs, {arguments.seeds} seeds, Adam {RATE:g}, p {P}, "
            f"label smoothing {arguments.label_smoothing:g}, "
            f"{minutes:.0f} minutes of one core"
        )
        report(f"Multi-sample dropout: {note}", summary(curves), arguments.json)
        if arguments.plot:
            draw(arguments.plot, curves, f"{note}; bands: smallest to largest over the seeds")


if __name__ == "__main__":
    main()
