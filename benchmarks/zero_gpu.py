"""ZeRO on one GPU beside DDP and Lightning's own DeepSpeedStrategy: step time, memory, and whether the losses agree.

An encoder of 12 layers of 768 (101 M parameters) that learns classes of sentences under bf16-mixed with AdamW. On one
process there is nothing to divide: what a stage costs here is what it does besides, and only offloading saves memory.
"MiB at most" is what CUDA's allocator held in the last steps. Losses are compared step by step with those of one device
under plain autocast.

    python benchmarks/zero_gpu.py [--steps 30] [--rows 32] [--tokens 128] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from common import report, use_device
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.nn import functional as F

from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.strategies import DDP, ActivationCheckpointing, Lookahead, SingleDevice, Zero

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from ranks import run_ranks

CLASSES, WARM_UP = 10, 5
STRATEGIES: dict[str, Callable[[], Any]] = {
    "Lightning's, stage 1": lambda: DeepSpeedStrategy(stage=1, logging_level=logging.ERROR),
    "Lightning's, stage 2": lambda: DeepSpeedStrategy(stage=2, logging_level=logging.ERROR),
    "Lightning's, stage 3": lambda: DeepSpeedStrategy(stage=3, logging_level=logging.ERROR),
    "single": lambda: SingleDevice(),
    "ddp": lambda: DDP(process_group_backend="nccl"),
    "zero_1": lambda: Zero(stage=1),
    "zero_2": lambda: Zero(stage=2),
    "zero_3": lambda: Zero(stage=3),
    "zero_2, Lookahead and recomputation": lambda: Zero(stage=2, techniques=[ActivationCheckpointing(), Lookahead()]),
    "zero_2, optimiser in CPU memory": lambda: Zero(stage=2, offload_optimizer=True),
    "zero_3, optimiser and parameters in CPU memory": lambda: Zero(
        stage=3, offload_optimizer=True, offload_parameters=True
    ),
}


class Sentences(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = TransformerConfig(21128, dim=768, num_layers=12, num_heads=12, feedforward_dim=3072, dropout=0.0)
        self.encoder = Transformer(config)
        self.head = nn.Linear(config.dim, CLASSES)
        self.seconds: list[float] = []
        self.losses: list[Tensor] = []

    def blocks(self) -> Any:
        return self.encoder.blocks()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.head(self.encoder(batch[0]).mean(1)).float(), batch[1])
        self.losses.append(loss.detach())
        return loss

    def on_train_batch_start(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) == WARM_UP:
            torch.cuda.reset_peak_memory_stats()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def measure(steps: int, rows: int, tokens: int) -> dict[str, Any]:
    """Train with one strategy after the other; runs in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))  # what is offloaded is updated by the processor
    return {name: _measured(strategy, steps, rows, tokens) for name, strategy in STRATEGIES.items()}


def _measured(strategy: Callable[[], Any], steps: int, rows: int, tokens: int) -> dict[str, Any] | str:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 21128, (rows * steps, tokens), generator=generator)
    labels = ids[:, 0] % CLASSES
    model = Sentences()
    try:
        trainer = pl.Trainer(
            accelerator="gpu", devices=1, strategy=strategy(), precision="bf16-mixed", max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        data = torch.utils.data.TensorDataset(ids, labels)
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=rows, pin_memory=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {
        "ms a step": 1000 * statistics.median(model.seconds[WARM_UP:]),
        "MiB at most": (torch.cuda.max_memory_allocated() - before) / 2**20,
        "losses": torch.stack(model.losses).float().tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json")
    options = parser.parse_args()
    found = run_ranks(measure, 1, options.steps, options.rows, options.tokens)[0]
    base = found["single"]
    rows = []
    for name, one in found.items():
        if isinstance(one, str):
            print(f"{name}: {one}", file=sys.stderr)
            continue
        rows.append(
            {
                "strategy": name,
                "ms a step": one["ms a step"],
                "times single": one["ms a step"] / base["ms a step"],
                "MiB at most": one["MiB at most"],
                "times its memory": one["MiB at most"] / base["MiB at most"],
                "loss differs by at most": max(abs(a - b) for a, b in zip(one["losses"], base["losses"], strict=True)),
                "last loss": one["losses"][-1],
            }
        )
    use_device("cuda")
    report(f"ZeRO on one GPU, bf16-mixed, {options.rows} x {options.tokens} tokens a step", rows, options.json)


if __name__ == "__main__":
    main()
