"""What it costs that all processes know of a request to stop: Lightning's broadcast before each batch, and kexue's.

Two CPU processes train a tiny model under DDP, where a step is almost nothing but overhead. `none` has no agreement at
all. Beside the time on the clock stands the processor time of the training thread, which a busy machine changes little.
On GPUs Lightning's host waits for the device in each batch to read the result; kexue's number travels over gloo between
hosts while the step is computed.

    python benchmarks/preemption.py [--steps 500] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import in_turn, median_and_spread, report

from kexue.callbacks import Preemption
from kexue.strategies import DDP

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from ranks import run_ranks

WARM_UP = 50


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 16)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def now() -> tuple[float, float]:
    """Microseconds so far: by the clock, and of the processor in this thread."""
    return 1e6 * time.perf_counter(), 1e6 * time.thread_time()


class Clock(pl.Callback):
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP:
            self.start = now()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = now()


def microseconds(kind: str, steps: int) -> tuple[float, float]:
    """Train with one kind of agreement; return the time of a step, by the clock and of the processor."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDP(process_group_backend="gloo"),
        max_epochs=1,
        callbacks=[clock, *([Preemption()] if kind == "kexue" else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    if kind == "none":
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    data = torch.utils.data.DataLoader([torch.ones(8, 16)] * (steps + WARM_UP), batch_size=None)
    trainer.fit(Tiny(), data)
    return (clock.end[0] - clock.start[0]) / steps, (clock.end[1] - clock.start[1]) / steps


def measure(steps: int, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """All kinds in turn, in this pair of processes."""
    warnings.filterwarnings("ignore")
    kinds = ("none", "kexue", "lightning")
    return in_turn({kind: lambda kind=kind: microseconds(kind, steps) for kind in kinds}, repeats)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    found = run_ranks(measure, 2, arguments.steps, arguments.repeats)[0]
    rows = []
    for kind, values in found.items():
        clock, processor = zip(*values, strict=True)
        (step, spread), (used, _) = median_and_spread(clock), median_and_spread(processor)
        bare, _ = median_and_spread([second for _, second in found["none"]])
        columns = ("agreement", "step, us", "+-", "processor, us", "over none, us")
        rows.append(dict(zip(columns, (kind, *map(round, (step, spread, used, used - bare))), strict=True)))
    report("preemption", rows, arguments.json)


if __name__ == "__main__":
    main()
