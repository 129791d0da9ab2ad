"""ZeRO 1, 2, 3 on two CPU processes: bytes per process (counted) and step time, beside DDP and Lightning's settings.

A 20 M-parameter MLP with AdamW in float32. "float32 copy" is the copy of its part of the parameters that DeepSpeed's
optimiser works on, also where the parameters are float32 already, as a share of DDP's parameters. The peer is
Lightning's own `DeepSpeedStrategy` with its default settings; only its refusal of CPUs is lifted. Each turn starts two
processes for DDP and our stages, and two for DDP and the peer's; the ratio is to the DDP of the same processes.

    OMP_NUM_THREADS=1 python benchmarks/zero.py [--repeats 5] [--steps 12] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import report
from stock import StockOnCPU
from torch import Tensor, nn

from kexue.strategies import DDP, Zero

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from ranks import run_ranks

WORLD = int(os.environ.get("WORLD_SIZE", "2"))


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
        return {
            "parameters": bytes_of(parameters),
            "gradients": bytes_of(grads),
            "state": bytes_of(state),
            "float32 copy": 0,
        }
    own = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in parameters]
    grads = [p.grad for p in parameters if p.grad is not None] + tensors_in(dict(zero.averaged_gradients))
    grads += tensors_in(getattr(zero, "grads_in_partition", None) or [])
    inner = zero.optimizer
    copies = getattr(zero, "single_partition_of_fp32_groups", None) or getattr(zero, "fp32_partitioned_groups_flat", [])
    return {
        "parameters": bytes_of(own),
        "gradients": bytes_of(grads),
        "state": bytes_of(tensors_in([list(s.values()) for s in inner.state.values()])),
        "float32 copy": bytes_of(list(copies)),
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


def contenders(kind: str) -> dict[str, Any]:
    made: dict[str, Any] = {"ddp": lambda: DDP(process_group_backend="gloo")}
    for stage in (1, 2, 3):
        made[f"{kind}_{stage}"] = lambda stage=stage: (Zero if kind == "zero" else StockOnCPU)(stage=stage)
    return made


def measure(kind: str, steps: int) -> dict[str, dict[str, Any]]:
    """Train DDP and then each stage of one kind; runs in each process."""
    warnings.filterwarnings("ignore")
    results: dict[str, dict[str, Any]] = {}
    for name, strategy in contenders(kind).items():
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
        results[name] = {"seconds": statistics.median(model.seconds[2:-1]), **counter.bytes}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    turns: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        # Processes of their own for each kind, since Zero tunes the process it runs in; DDP stands beside both.
        for kind in ("zero", "stock"):
            for name, found in run_ranks(measure, 2, kind, options.steps)[0].items():
                turns.setdefault(f"ddp beside {kind}" if name == "ddp" else name, []).append(found)
    rows = []
    for name, found in turns.items():
        ddp = turns["ddp beside stock" if "stock" in name else "ddp beside zero"]
        times = [turn["seconds"] for turn in found]
        ratios = [turn["seconds"] / other["seconds"] for turn, other in zip(found, ddp, strict=True)]
        rows.append(
            {
                "strategy": name,
                **{kind: round(found[0][kind] / ddp[0][kind], 3) for kind in ("parameters", "gradients", "state")},
                "float32 copy": round(found[0]["float32 copy"] / ddp[0]["parameters"], 3),
                "step ms": round(1000 * statistics.median(times), 1),
                "least": round(1000 * min(times), 1),
                "most": round(1000 * max(times), 1),
                "times ddp": round(statistics.median(ratios), 2),
            }
        )
    report("zero: bytes per process as a share of DDP's, and step time, 2 CPU processes", rows, options.json)


if __name__ == "__main__":
    main()
