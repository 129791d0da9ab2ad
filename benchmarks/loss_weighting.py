"""What every rule of loss weighting is worth on badly scaled tasks, and what it costs.

Part `digits` trains `digits_multitask` (class, parity, and a pixel sum whose loss is 10^4 times larger) with every
rule, with equal weights, and with one task alone, and scores the test images: two accuracies and the explained share
of the variance of the pixel sums. A task is kept if its score is within 0.02 of that of training it alone.

Part `cost` measures a training step of that model with each rule against the step without; part `tasks` a step of a
larger network by the number of tasks.

    python benchmarks/loss_weighting.py --part digits|cost|tasks [--seeds 3] [--epochs 60] [--repeats 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from common import in_turn, median_and_spread, report
from torch import Tensor, nn

from kexue.data.digits import DigitsDataModule
from kexue.lightning_modules.imaging import DigitsMultitaskModule
from kexue.strategies import LossWeighting, SingleDevice
from kexue.strategies.loss_weighting import prior_cross_entropy, prior_squared_error

TASKS = ("digit", "parity", "pixel_sum")
WITHIN = 0.02
Step = Callable[[], None]


def contenders(reference: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Arguments of `LossWeighting` by the name of the run."""
    alone = {
        f"{task} alone": {"rule": "fixed", "weights": {name: float(name == task) for name in TASKS}} for task in TASKS
    }
    plain = ["real_time", "geometric_mean", "generalised_mean", "uncertainty", "imtl_l", "dwa", "random"]
    by_gradients = ["gradient_norm", "mgda", "pcgrad", "cagrad", "imtl_g", "gradnorm"]
    return {
        **alone,
        "equal": {"rule": "fixed"},
        "initial": {"rule": "initial"},
        "prior": {"rule": "prior", "reference": reference},
        **{name: {"rule": name} for name in [*plain, *by_gradients]},
        "priority, main digit": {"rule": "priority", "main": "digit"},
        "mgda, parameters": {"rule": "mgda", "gradients": "parameters"},
        "pcgrad, parameters": {"rule": "pcgrad", "gradients": "parameters"},
    }


class Digits(DigitsMultitaskModule):
    """The model, smaller, with a learning rate that falls to 0: what is left at the end is not the noise of steps."""

    def __init__(self) -> None:
        super().__init__(channels=8, num_blocks=1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=4e-3, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def prior_losses(data: DigitsDataModule) -> dict[str, float]:
    """The losses of the best constant predictions on the training images."""
    records = data.read_split("train")
    digits = torch.tensor([record.digit for record in records])
    sums = torch.tensor([float(record.image.sum()) for record in records])
    return {
        "digit": prior_cross_entropy(digits.bincount()),
        "parity": prior_cross_entropy((digits % 2).bincount()),
        "pixel_sum": prior_squared_error(sums),
    }


def scores(module: DigitsMultitaskModule, data: DigitsDataModule) -> dict[str, float]:
    """Scores of the test images, 1 is perfect."""
    batch = data.collator()(list(data.read_split("test")))
    module.eval()
    with torch.no_grad():
        predicted = module(batch["image"])
    error = (predicted["pixel_sum"] - batch["pixel_sum"]).square().mean() / batch["pixel_sum"].var(correction=0)
    return {
        "digit": (predicted["digit"].argmax(-1) == batch["digit"]).float().mean().item(),
        "parity": (predicted["parity"].argmax(-1) == batch["parity"]).float().mean().item(),
        "pixel_sum": 1 - error.item(),
    }


def train(options: dict[str, Any], seed: int, epochs: int) -> dict[str, float]:
    """Train with the losses as they are, weighted by a rule; return the scores and the seconds."""
    pl.seed_everything(seed, verbose=False)
    data = DigitsDataModule(batch_size=64, seed=seed)
    module = Digits()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=SingleDevice([LossWeighting(**options)]), max_epochs=epochs,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    return {**scores(module, data), "seconds": time.perf_counter() - start}


def digits(seeds: int, epochs: int) -> list[dict[str, Any]]:
    """A row for every rule: medians over seeds."""
    runs = contenders(prior_losses(DigitsDataModule()))
    found = {}
    for name, options in runs.items():
        results = [train(options, seed, epochs) for seed in range(seeds)]
        found[name] = {key: statistics.median(result[key] for result in results) for key in results[0]}
        print(name, {key: round(value, 4) for key, value in found[name].items()}, flush=True)
    rows = []
    for name, result in found.items():
        row: dict[str, Any] = {"rule": name}
        row |= {task: round(result[task], 3) for task in TASKS}
        lost = [task for task in TASKS if result[task] < found[f"{task} alone"][task] - WITHIN]
        row["every task within 0.02"] = "" if name.endswith("alone") else "no: " + ", ".join(lost) if lost else "yes"
        row["seconds"] = round(result["seconds"], 1)
        rows.append(row)
    return rows


class ManyTasks(pl.LightningModule):
    """A network of four layers that T regressions share."""

    def __init__(self, num_tasks: int, dim: int = 512) -> None:
        super().__init__()
        layers = [part for _ in range(4) for part in (nn.Linear(dim, dim), nn.Tanh())]
        self.encoder = nn.Sequential(*layers)
        self.head = nn.Linear(dim, num_tasks)

    def task_losses(self, features: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Mean squared errors."""
        errors = (self.head(features) - batch[1]).square().mean(0)
        return {f"task_{index}": error for index, error in enumerate(errors.unbind())}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        """Sum of the losses."""
        losses = self.task_losses(self.encoder(batch[0]), batch)
        return {"loss": torch.stack(list(losses.values())).sum(), "losses": losses}


def bare_step(module: Any, batch: Any, options: dict[str, Any] | None) -> Step:
    """A training step in a plain loop, with the technique or without."""
    module.log = module.log_dict = lambda *args, **kwargs: None
    technique = None if options is None else LossWeighting(**options)
    if technique is not None:
        technique.attach(module)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        outputs = module.training_step(batch, 0)
        if technique is not None:
            outputs = technique.combine(outputs, module)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()

    return step


def milliseconds(step: Step, steps: int) -> float:
    """Processor time of a step in this thread: other programs on the machine do not count."""
    for _ in range(3):
        step()
    start = time.thread_time()
    for _ in range(steps):
        step()
    return 1000 * (time.thread_time() - start) / steps


def compare(steps: dict[str, Step], repeats: int, count: int) -> Iterator[tuple[str, float, float]]:
    """Name, milliseconds, and share added to the first, in pairs of the same turn."""
    times = in_turn({name: partial(milliseconds, step, count) for name, step in steps.items()}, repeats)
    base = next(iter(times.values()))
    for name, values in times.items():
        shares = [value / other - 1 for value, other in zip(values, base, strict=True)]
        yield name, median_and_spread(values)[0], median_and_spread(shares)[0]


def cost(repeats: int) -> list[dict[str, Any]]:
    """A row for every rule on digits."""
    data = DigitsDataModule(batch_size=64)
    batch = data.collator()(list(data.read_split("train"))[:64])
    runs: dict[str, Any] = {"none": None}
    runs |= {name: run for name, run in contenders(prior_losses(data)).items() if not name.endswith("alone")}
    steps = {}
    for name, options in runs.items():
        torch.manual_seed(0)
        module = DigitsMultitaskModule()
        module.configure_model()
        steps[name] = bare_step(module, batch, options)
    return [
        {"rule": name, "ms a step": round(step, 2), "added": "" if name == "none" else f"{share:+.0%}"}
        for name, step, share in compare(steps, repeats, 20)
    ]


def by_tasks(repeats: int) -> list[dict[str, Any]]:
    """A row for every number of tasks."""
    rows = []
    for num_tasks in (2, 4, 8, 16):
        generator = torch.Generator().manual_seed(0)
        batch = (torch.randn(64, 512, generator=generator), torch.randn(64, num_tasks, generator=generator))
        runs: dict[str, Any] = {"none": None, "real_time": {"rule": "real_time"}}
        for where in ("features", "parameters"):
            for rule in ("mgda", "pcgrad", "cagrad"):
                runs[f"{rule}, {where}"] = {"rule": rule, "gradients": where}
        steps = {name: bare_step(ManyTasks(num_tasks), batch, options) for name, options in runs.items()}
        row: dict[str, Any] = {"tasks": num_tasks}
        for name, step, share in compare(steps, repeats, 5):
            row["ms without" if name == "none" else name] = round(step, 2) if name == "none" else f"{share:+.0%}"
        rows.append(row)
    return rows


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["digits", "cost", "tasks"], required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if arguments.part == "digits":
        name, rows = "Loss weighting on badly scaled digits", digits(arguments.seeds, arguments.epochs)
    elif arguments.part == "cost":
        name, rows = "Loss weighting: cost of a step on digits", cost(arguments.repeats)
    else:
        name, rows = "Loss weighting: cost by number of tasks", by_tasks(arguments.repeats)
    report(name, rows, arguments.json)


if __name__ == "__main__":
    main()
