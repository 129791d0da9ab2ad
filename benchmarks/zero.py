"""ZeRO 1, 2, 3 on two CPU processes: bytes per process (counted) and step time, beside DDP and Lightning's settings.

A 20 M-parameter MLP with AdamW in float32. The peer is Lightning's own `DeepSpeedStrategy` with its default settings;
only its refusal of CPUs is lifted. All contenders train in turn in the same two processes, several times over.

    OMP_NUM_THREADS=1 python benchmarks/zero.py [--repeats 5] [--steps 12] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import report
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from kexue.strategies import DDP, Zero

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from ranks import run_ranks

WORLD = int(os.environ.get("WORLD_SIZE", "2"))


class StockOnCPU(DeepSpeedStrategy):
    """Lightning's strategy as it is, allowed to run on CPUs."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class MLP(pl.LightningModule):
    def __init__(self, dim: int = 1280, depth: int = 12) -> None:
        super().__init__()
        layers = [layer for _ in range(depth) for layer in (nn.Linear(dim, dim), nn.GELU())]
        self.net = nn.Sequential(*layers)
        self.seconds: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).pow(2).mean()

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, list | tuple) else []


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def held(model: pl.LightningModule, engine: Any) -> dict[str, int]:
    """Bytes that this process holds between the backward pass and the step."""
    parameters = list(model.parameters())
    zero = getattr(engine, "optimizer", None)
    if not hasattr(zero, "averaged_gradients"):  # DDP
        optimizer: Any = model.optimizers(use_pl_optimizer=False)
        grads = [p.grad for p in parameters if p.grad is not None]
        state = tensors_in(list(optimizer.state.values()))
        return {"parameters": bytes_of(parameters), "gradients": bytes_of(grads), "state": bytes_of(state)}
    own = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in parameters]
    grads = [p.grad for p in parameters if p.grad is not None] + tensors_in(dict(zero.averaged_gradients))
    grads += tensors_in(getattr(zero, "grads_in_partition", None) or [])
    inner = zero.optimizer
    return {
        "parameters": bytes_of(own),
        "gradients": bytes_of(grads),
        "state": bytes_of(tensors_in([list(s.values()) for s in inner.state.values()])),
    }


class Counter(pl.Callback):
    """Counts in the last step, when the optimiser's state exists."""

    def __init__(self, at: int) -> None:
        self.at, self.bytes = at, {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.at:
            return
        engine: Any = trainer.strategy.model
        if not hasattr(engine, "averaged_gradients") and hasattr(engine, "step"):
            step = engine.step

            def counted(*args: Any, **kwargs: Any) -> Any:
                self.bytes = held(module, engine)
                return step(*args, **kwargs)

            engine.step = counted

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == self.at and not hasattr(trainer.strategy.model, "step"):
            self.bytes = held(module, trainer.strategy.model)


def contenders() -> dict[str, Any]:
    made: dict[str, Any] = {"ddp": lambda: DDP(process_group_backend="gloo")}
    for stage in (1, 2, 3):
        made[f"zero_{stage}"] = lambda stage=stage: Zero(stage=stage)
        made[f"stock_{stage}"] = lambda stage=stage: StockOnCPU(stage=stage)
    return made


def measure(repeats: int, steps: int) -> dict[str, dict[str, Any]]:
    """Train every contender in turn, several times; runs in each process."""
    warnings.filterwarnings("ignore")
    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in contenders()}
    for _ in range(repeats):
        for name, strategy in contenders().items():
            torch.manual_seed(0)
            model, counter = MLP(), Counter(steps - 1)
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=WORLD,
                strategy=strategy(),
                max_steps=steps,
                callbacks=[counter],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            data = torch.utils.data.DataLoader(torch.randn(16 * steps, 1280), batch_size=16)
            trainer.fit(model, data)
            results[name]["seconds"].append(sorted(model.seconds[2:-1])[len(model.seconds[2:-1]) // 2])
            results[name].update(counter.bytes)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = run_ranks(measure, 2, options.repeats, options.steps, timeout=3000)[0]
    ddp = results["ddp"]
    rows = []
    for name, found in results.items():
        times = sorted(found["seconds"])
        ratios = sorted(t / d for t, d in zip(found["seconds"], ddp["seconds"], strict=True))
        rows.append(
            {
                "strategy": name,
                **{kind: round(found[kind] / ddp[kind], 3) for kind in ("parameters", "gradients", "state")},
                "step ms": round(1000 * times[len(times) // 2], 1),
                "least": round(1000 * times[0], 1),
                "most": round(1000 * times[-1], 1),
                "times ddp": round(ratios[len(ratios) // 2], 2),
            }
        )
    report("zero: bytes per process as a share of DDP's, and step time, 2 CPU processes", rows, options.json)


if __name__ == "__main__":
    main()
