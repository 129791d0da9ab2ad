"""What every rule of loss weighting is worth on badly scaled tasks, and what it costs.

Part `digits` trains `digits_multitask` (class, parity, and a pixel sum whose loss is 10^4 times larger) with every
rule, with equal weights, and with one task alone, and scores the test images: two accuracies and the explained share
of the variance of the pixel sums. A task is kept if its score is within 0.02 of that of training it alone.

Part `cost` measures what each rule adds to a training step, of that model and of an encoder of 6 layers of 384; part
`tasks` a step of a network of four layers of 512 by the number of tasks, beside torchjd, and beside LibMTL where it is
installed (`pip install --no-deps LibMTL`).

    python benchmarks/loss_weighting.py --part digits [--seeds 3] [--epochs 100] [--rate 0.01] [--json FILE]
    python benchmarks/loss_weighting.py --part cost|tasks [--repeats 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from common import in_turn, median_and_spread, report
from torch import Tensor, nn

from kexue.data.digits import DigitsDataModule
from kexue.lightning_modules.imaging import DigitsMultitaskModule
from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.strategies import LossWeighting, SingleDevice
from kexue.strategies.loss_weighting import prior_cross_entropy, prior_squared_error
from kexue.strategies.loss_weighting.rules import RULES

TASKS = ("digit", "parity", "pixel_sum")
WITHIN = 0.02
EPOCHS, RATE = 100, 1e-2
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
        "real_time, smoothing 0.9": {"rule": "real_time", "smoothing": 0.9},
        "mgda, parameters": {"rule": "mgda", "gradients": "parameters"},
        "pcgrad, parameters": {"rule": "pcgrad", "gradients": "parameters"},
        "imtl_g, parameters": {"rule": "imtl_g", "gradients": "parameters"},
        "torchjd, parameters": {"rule": "torchjd", "aggregator": "AlignedMTL", "gradients": "parameters"},
    }


class Digits(DigitsMultitaskModule):
    """The model, smaller, with a learning rate that falls to 0: what is left at the end is not the noise of steps."""

    def __init__(self, rate: float = RATE) -> None:
        super().__init__(channels=8, num_blocks=1)
        self.rate = rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.01)
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


def train(options: dict[str, Any], seed: int, epochs: int = EPOCHS, rate: float = RATE) -> dict[str, float]:
    """Train with the losses as they are, weighted by a rule; return the scores and the seconds."""
    pl.seed_everything(seed, verbose=False)
    data = DigitsDataModule(batch_size=64, seed=seed)
    module = Digits(rate)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=SingleDevice([LossWeighting(**options)]), max_epochs=epochs,
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, datamodule=data)
    return {**scores(module, data), "seconds": time.perf_counter() - start}


def lost(result: Mapping[str, float], found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The tasks of a run whose scores are below those of training them alone."""
    return [task for task in TASKS if result[task] < found[f"{task} alone"][task] - WITHIN]


def digits(seeds: int, epochs: int, rate: float) -> list[dict[str, Any]]:
    """A row for every rule: medians over seeds."""
    runs = contenders(prior_losses(DigitsDataModule()))
    found = {}
    for name, options in runs.items():
        results = [train(options, seed, epochs, rate) for seed in range(seeds)]
        found[name] = {key: statistics.median(result[key] for result in results) for key in results[0]}
        print(name, {key: round(value, 4) for key, value in found[name].items()}, flush=True)
    rows = []
    for name, result in found.items():
        row: dict[str, Any] = {"rule": name}
        row |= {task: round(result[task], 3) for task in TASKS}
        tasks = lost(result, found)
        row["every task within 0.02"] = "" if name.endswith("alone") else "no: " + ", ".join(tasks) if tasks else "yes"
        row["seconds"] = round(result["seconds"], 1)
        rows.append(row)
    return rows


class Encoder(pl.LightningModule):
    """A step of real size: an encoder of 6 layers of 384 and three scores a token, batches of 16 x 64."""

    def __init__(self) -> None:
        super().__init__()
        config = TransformerConfig(
            vocab_size=5000, dim=384, num_layers=6, num_heads=6, feedforward_dim=1536, max_length=64, dropout=0.1
        )
        self.net = Transformer(config)
        self.head = nn.Linear(384, 12)

    def task_losses(self, features: Tensor, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Cross-entropies of three tasks."""
        scores = self.head(features).flatten(0, 1).split(4, -1)
        return {task: F.cross_entropy(part, batch[1].flatten()) for task, part in zip(TASKS, scores, strict=True)}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        """Sum of the losses."""
        losses = self.task_losses(self.net(batch[0]), batch)
        return {"loss": torch.stack(list(losses.values())).sum(), "losses": losses}


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


def torchjd_step(module: ManyTasks, batch: Any, rule: str) -> Step:
    """The same by torchjd's `mtl_backward`."""
    from torchjd import aggregation, autojac

    aggregator = {"mgda": aggregation.MGDA, "pcgrad": aggregation.PCGrad}[rule]()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def step() -> None:
        features = module.encoder(batch[0])
        losses = list(module.task_losses(features, batch).values())
        optimizer.zero_grad()
        autojac.mtl_backward(losses, features=features, retain_graph=True)  # one head for all tasks
        autojac.jac_to_grad(list(module.encoder.parameters()), aggregator)
        optimizer.step()

    return step


@cache
def libmtl() -> Any:
    """LibMTL's weightings, None where it is not installed."""
    spec = importlib.util.find_spec("LibMTL")
    if spec is None:
        return None
    # The package's own __init__ imports torchvision; its weightings do without.
    package = types.ModuleType("LibMTL")
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules["LibMTL"] = package
    return importlib.import_module("LibMTL.weighting")


def libmtl_step(module: ManyTasks, batch: Any, rule: str, features: bool) -> Step:
    """The same by a class of LibMTL, whose trainer lets it take the way back from the losses."""
    weighting = libmtl()
    balancer = {"mgda": weighting.MGDA, "pcgrad": weighting.PCGrad}[rule]()
    balancer.task_num = module.head.out_features
    balancer.task_name = [f"task_{index}" for index in range(balancer.task_num)]
    balancer.device, balancer.rep_grad = torch.device("cpu"), features
    balancer.get_share_params = module.encoder.parameters
    balancer.zero_grad_share_params = lambda: module.encoder.zero_grad(set_to_none=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def step() -> None:
        found = module.encoder(batch[0])
        optimizer.zero_grad()
        if features:
            balancer.rep = found
            balancer.rep_tasks = {name: found.detach().requires_grad_() for name in balancer.task_name}
            losses = [module.task_losses(balancer.rep_tasks[name], batch)[name] for name in balancer.task_name]
        else:
            losses = list(module.task_losses(found, batch).values())
        balancer.backward(torch.stack(losses), mgda_gn="none")
        optimizer.step()

    return step


def milliseconds(step: Step, steps: int) -> float:
    """Processor time of a step in this thread: other programs on the machine do not count."""
    for _ in range(min(3, steps)):
        step()
    start = time.thread_time()
    for _ in range(steps):
        step()
    return 1000 * (time.thread_time() - start) / steps


def compare(steps: dict[str, Step], repeats: int, count: int) -> Iterator[tuple[str, float, float]]:
    """Name, milliseconds, and milliseconds added to the first, in pairs of the same turn."""
    times = in_turn({name: partial(milliseconds, step, count) for name, step in steps.items()}, repeats)
    base = next(iter(times.values()))
    for name, values in times.items():
        added = [value - other for value, other in zip(values, base, strict=True)]
        yield name, median_and_spread(values)[0], median_and_spread(added)[0]


def alone(options: dict[str, Any] | None) -> Step:
    """Nothing of a step but the sum of its losses and the way back to them: what a rule by losses adds to."""
    module: Any = pl.LightningModule()
    module.log_dict = lambda *args, **kwargs: None
    losses = {task: torch.tensor(1.0, requires_grad=True) for task in TASKS}
    technique = None if options is None else LossWeighting(**options)
    if technique is not None:
        technique.attach(module)

    def step() -> None:
        outputs: Any = {"loss": torch.stack(list(losses.values())).sum(), "losses": losses}
        if technique is not None:
            outputs = technique.combine(outputs, module)
        outputs["loss"].backward()

    return step


def cost(repeats: int) -> list[dict[str, Any]]:
    """A row for every rule: what it adds to steps of two models.

    Rules by losses add the same few operations to any step: they are timed alone, since no clock finds them in a step.
    """
    data = DigitsDataModule(batch_size=64)
    digits_batch = data.collator()(list(data.read_split("train"))[:64])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 5000, (16, 64), generator=generator)
    encoder_batch = (tokens, torch.randint(0, 4, (16, 64), generator=generator))
    runs = {name: run for name, run in contenders(prior_losses(data)).items() if not name.endswith("alone")}
    by_losses = [name for name, run in runs.items() if not RULES[run["rule"]].uses_gradients]

    def steps(make: Callable[[], Any], batch: Any, names: Sequence[str]) -> dict[str, Step]:
        found = {}
        for name, options in [("none", None), *((name, runs[name]) for name in names)]:
            torch.manual_seed(0)
            module = make()
            module.configure_model()
            found[name] = bare_step(module, batch, options)
        return found

    by_gradients = [name for name in runs if name not in by_losses]
    digits_steps = steps(DigitsMultitaskModule, digits_batch, by_gradients)
    # A step of a second: one rule for each place where gradients are taken says it all.
    encoder_steps = steps(Encoder, encoder_batch, ["mgda", "mgda, parameters"])
    short = {"none": alone(None), **{name: alone(runs[name]) for name in by_losses}}
    few = {name: extra for name, _, extra in compare(short, repeats, 200)}
    rows: list[dict[str, Any]] = [{"rule": "none", "added": ""}, *({"rule": name} for name in runs)]
    for model, found in (
        ("digits", list(compare(digits_steps, repeats, 10))),
        ("6x384", list(compare(encoder_steps, min(3, repeats), 1))),
    ):
        plain = found[0][1]
        extras = few | {name: extra for name, _, extra in found[1:]}
        for row in rows:
            name = row["rule"]
            row["added"] = f"{1000 * few[name]:.0f} us" if name in few else ""
            row[f"to {model}"] = f"{extras[name] / plain:+.2%}" if name in extras else ""
        rows[0][f"to {model}"] = f"{plain:.1f} ms"
    return rows


def by_tasks(repeats: int) -> list[dict[str, Any]]:
    """A row for every number of tasks: milliseconds of a step, ours and the peers'."""
    rows = []
    for num_tasks in (2, 4, 8, 16):
        generator = torch.Generator().manual_seed(0)
        batch = (torch.randn(64, 512, generator=generator), torch.randn(64, num_tasks, generator=generator))
        steps = {"none": bare_step(ManyTasks(num_tasks), batch, None)}
        for where in ("features", "parameters"):
            for rule in ("mgda", "pcgrad", "cagrad"):
                options = {"rule": rule, "gradients": where}
                steps[f"{rule}, {where}"] = bare_step(ManyTasks(num_tasks), batch, options)
                if libmtl() is not None and rule != "cagrad" and (where, rule) != ("features", "pcgrad"):
                    step = libmtl_step(ManyTasks(num_tasks), batch, rule, where == "features")
                    steps[f"{rule}, {where}, LibMTL"] = step
                if where == "parameters" and rule != "cagrad":
                    steps[f"{rule}, {where}, torchjd"] = torchjd_step(ManyTasks(num_tasks), batch, rule)
        times = {name: round(step, 1) for name, step, _ in compare(steps, repeats, 3)}
        rows.append({"tasks": num_tasks, **times})
    columns = [name for name in rows[0] if name != "tasks"]
    return [{"ms a step": name, **{f"T = {row['tasks']}": row[name] for row in rows}} for name in columns]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["digits", "cost", "tasks"], required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if arguments.part == "digits":
        name, rows = "Loss weighting on badly scaled digits", digits(arguments.seeds, arguments.epochs, arguments.rate)
    elif arguments.part == "cost":
        name, rows = "Loss weighting: cost of a step on digits", cost(arguments.repeats)
    else:
        name, rows = "Loss weighting: cost by number of tasks", by_tasks(arguments.repeats)
    report(name, rows, arguments.json)


if __name__ == "__main__":
    main()
