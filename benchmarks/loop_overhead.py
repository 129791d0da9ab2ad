"""What the training loop costs around the model: kexue's defaults, Lightning lean, Lightning with its own CSV and bar.

Each contender trains the same module on the same batches, ready in memory, with the same optimiser; a step's overhead
is its time less that of a bare PyTorch loop in the same turn. Beside the time on the clock stand the processor time of
the training thread and the number of Python calls a step: the latter is the same on any machine, however busy. Where
the clock of the machine moves between turns, the difference of the fastest turns tells more than the median of the
differences. The module is `digits_multitask`, or one linear layer.

    python benchmarks/loop_overhead.py [--steps 500] [--repeats 5] [--step-ms 50] [--json FILE]
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import os
import pstats
import pty
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import in_turn, median_and_spread, report
from rich.console import Console
from torch import Tensor

from kexue.callbacks import (
    Alerts,
    Checkpoints,
    CSVMetrics,
    LightLoop,
    MemoryPeak,
    PredictionTable,
    Preemption,
    ProgressBar,
    StopOnNonFinite,
    StopWhenStalled,
    Throughput,
    wandb_logger,
)
from kexue.lightning_modules.imaging import DigitsMultitaskModule

Batch = dict[str, Tensor]
Times = tuple[float, float]  # milliseconds a step: by the clock, and of the processor in this thread


def now() -> Times:
    """Both times so far, in milliseconds."""
    return 1000 * time.perf_counter(), 1000 * time.thread_time()


def per_step(start: Times, end: Times, steps: int) -> Times:
    """Both times that a step took."""
    return (end[0] - start[0]) / steps, (end[1] - start[1]) / steps


class Busy(DigitsMultitaskModule):
    """The digits model, which goes over its batch so many times in a step that the step lasts as long as asked."""

    passes = 1

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        for _ in range(self.passes - 1):
            self.features(batch["image"])
        return super().training_step(batch, batch_idx)


class OneLayer(pl.LightningModule):
    """A linear map of the images: what a step costs where the processor's caches hold all of its Python."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        loss = self.layer(batch["image"].flatten(1)).square().mean()
        self.log("train/loss", loss, batch_size=len(batch["image"]))
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Batches(torch.utils.data.Dataset):
    """A number of ready batches, the same few again and again."""

    def __init__(self, batches: list[Batch], steps: int) -> None:
        self.batches = batches
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index % len(self.batches)]


class Clock(pl.Callback):
    """Measures from the end of the warm-up to the end of the last step; saving at the end is not a step."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.start = self.end = now()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.warm_up:
            self.start = now()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = now()


def make_batches(size: int = 64, count: int = 8) -> list[Batch]:
    """Digits-like batches."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        image = torch.rand(size, 1, 8, 8, generator=generator)
        digit = torch.randint(10, (size,), generator=generator)
        batches.append({"image": image, "digit": digit, "parity": digit % 2, "pixel_sum": image.sum((1, 2, 3)) * 16})
    return batches


def make_module(passes: int) -> pl.LightningModule:
    """A new module with the same weights; no passes: of one layer."""
    torch.manual_seed(0)
    if not passes:
        return OneLayer()
    module = Busy(optimizer=partial(torch.optim.AdamW, lr=1e-3))
    module.passes = passes
    return module


@contextmanager
def terminal() -> Iterator[Console]:
    """A real terminal that someone reads, so that drawing costs what it costs."""
    leader, follower = pty.openpty()

    def drain() -> None:
        while True:
            try:
                if not os.read(leader, 65536):
                    return
            except OSError:
                return

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    with os.fdopen(follower, "w") as file:
        yield Console(file=file, force_terminal=True, width=140)
    reader.join()
    os.close(leader)


def bare(data: Batches, passes: int, warm_up: int) -> Times:
    """Times a step of a plain loop."""
    module: Any = make_module(passes)
    module.configure_model()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer = module.configure_optimizers()
    start = now()
    for index, batch in enumerate(torch.utils.data.DataLoader(data, batch_size=None)):
        if index == warm_up:
            start = now()
        loss = module.training_step(batch, index)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return per_step(start, now(), len(data) - warm_up)


def lightning(
    data: Batches, passes: int, warm_up: int, options: Callable[[Path, Console], dict[str, Any]], log_every: int
) -> Times:
    """Times a step under a Trainer with some options."""
    clock = Clock(warm_up)
    with tempfile.TemporaryDirectory() as folder, terminal() as console:
        chosen = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options(
            Path(folder), console
        )
        callbacks = [clock, *chosen.pop("callbacks", [])]
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, enable_model_summary=False, default_root_dir=folder,
            log_every_n_steps=log_every, callbacks=callbacks, **chosen,
        )  # fmt: skip
        trainer.fit(make_module(passes), torch.utils.data.DataLoader(data, batch_size=None))
        for logger in trainer.loggers:
            if hasattr(logger.experiment if hasattr(logger, "experiment") else None, "finish"):
                logger.experiment.finish()  # type: ignore[attr-defined]
    return per_step(clock.start, clock.end, len(data) - warm_up)


def calls_a_step(run: Callable[[Batches], Times], batches: list[Batch]) -> int:
    """Count Python calls of a step: those of a long run less those of a short one."""
    totals = []
    for steps in (100, 300):
        profile = cProfile.Profile()
        profile.runcall(run, Batches(batches, steps))
        totals.append(pstats.Stats(profile).total_calls)  # pyright: ignore[reportAttributeAccessIssue]
    return round((totals[1] - totals[0]) / 200)


def lean(folder: Path, console: Console) -> dict[str, Any]:
    """Nothing but the loop."""
    return {}


def csv_and_bar(folder: Path, console: Console) -> dict[str, Any]:
    """Lightning's own CSV logger and rich bar."""
    from pytorch_lightning.callbacks import RichProgressBar
    from pytorch_lightning.loggers import CSVLogger

    bar = RichProgressBar(console_kwargs={"file": console.file, "force_terminal": True, "width": 140})
    return {"logger": CSVLogger(folder), "callbacks": [bar], "enable_progress_bar": True}


def csv_and_tqdm(folder: Path, console: Console) -> dict[str, Any]:
    """Lightning's own CSV logger and the bar it falls back to."""
    from pytorch_lightning.callbacks import TQDMProgressBar
    from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
    from pytorch_lightning.loggers import CSVLogger

    class OnTerminal(TQDMProgressBar):
        def init_train_tqdm(self) -> Tqdm:
            return Tqdm(desc="Training", file=console.file, dynamic_ncols=False, ncols=140, smoothing=0, leave=True)

    return {"logger": CSVLogger(folder), "callbacks": [OnTerminal()], "enable_progress_bar": True}


def kexue_default(folder: Path, console: Console) -> dict[str, Any]:
    """What `kexue fit` uses: see conf/callbacks/default.yaml and conf/logger/default.yaml."""
    callbacks = [
        Checkpoints(folder / "checkpoints"),
        Preemption(),
        Throughput(),
        MemoryPeak(),
        PredictionTable(),
        Alerts(),
        pl.callbacks.LearningRateMonitor(logging_interval="step"),
        ProgressBar(console=console),
        StopOnNonFinite(),
        StopWhenStalled(folder / "ranks"),
        LightLoop(),
    ]
    options: dict[str, Any] = {
        "logger": [CSVMetrics(folder), wandb_logger(folder, offline=True)],
        "callbacks": callbacks,
        "enable_progress_bar": True,
        "enable_checkpointing": True,
    }
    try:
        from kexue.strategies import SingleDevice
    except ImportError:
        return options
    return options | {"strategy": SingleDevice()}


CONTENDERS = {
    "Lightning, lean": lean,
    "Lightning, CSVLogger + RichProgressBar": csv_and_bar,
    "Lightning, CSVLogger + TQDMProgressBar": csv_and_tqdm,
    "kexue, default": kexue_default,
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="steps measured in each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=0.0, help="make a step last about so long; 0: as it is")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--one-layer", action="store_true", help="a module of one linear layer")
    parser.add_argument("--log-every", type=int, default=50, help="log_every_n_steps")
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    warm_up = 50
    data = Batches(make_batches(arguments.batch), arguments.steps + warm_up)
    passes = 0 if arguments.one_layer else 1
    if arguments.step_ms:
        short = Batches(data.batches, 40)
        once, eleven = bare(short, 1, 10)[1], bare(short, 11, 10)[1]
        passes = max(1, round(1 + 10 * (arguments.step_ms - once) / (eleven - once)))
    loops: dict[str, Callable[[Batches], Times]] = {"PyTorch, bare loop": partial(bare, passes=passes, warm_up=warm_up)}
    for name, options in CONTENDERS.items():
        if arguments.only in name:
            log_every = arguments.log_every
            loops[name] = partial(lightning, passes=passes, warm_up=warm_up, options=options, log_every=log_every)
    times = in_turn({name: partial(loop, data) for name, loop in loops.items()}, arguments.repeats)
    base = times["PyTorch, bare loop"]
    rows = []
    for name, values in times.items():
        row: dict[str, Any] = {"loop": name, "calls a step": calls_a_step(loops[name], data.batches)}
        for column, kind in enumerate(("clock", "processor")):
            step, _ = median_and_spread([value[column] for value in values])
            # Against the bare loop of the same turn: a slow minute of the machine is in both.
            over = [value[column] - other[column] for value, other in zip(values, base, strict=True)]
            middle, spread = median_and_spread(over)
            row |= {
                f"{kind}: ms a step": round(step, 3),
                f"{kind}: overhead ms": round(middle, 3),
                f"{kind}: ±": round(spread, 3),
                f"{kind}: overhead of the fastest turns": round(
                    min(value[column] for value in values) - min(other[column] for other in base), 3
                ),
            }
        rows.append(row)
    what = "one layer, " if arguments.one_layer else ""
    report(f"loop overhead, {what}log_every_n_steps={arguments.log_every}", rows, arguments.json)


if __name__ == "__main__":
    main()
