"""Whether DeepSpeed trains what DDP trains: our `Zero` and Lightning's own strategy against DDP, on two CPU processes.

Last training loss of a small classifier after two epochs of six batches; with the resume, of the epoch that goes on
from its fourth batch. The peer is unchanged but for its refusal of CPUs.

    OMP_NUM_THREADS=1 python benchmarks/zero_results.py [--json FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import report
from pytorch_lightning.strategies import DDPStrategy
from stock import StockOnCPU

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from cells import train
from ranks import run_ranks

STAGE = 2
UNBROKEN = "DDP, never interrupted"
CONTENDERS = (UNBROKEN, "kexue DDP", "kexue Zero", "Lightning DDPStrategy", "Lightning DeepSpeedStrategy")
SGD = {"optimizer": "sgd", "lr": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "SGD, no accumulation": SGD,
    "SGD, 2 batches accumulated": {**SGD, "accumulate": 2},
    "SGD, 4 batches accumulated, 6 an epoch": {**SGD, "accumulate": 4},
    "SGD, 2 accumulated, clipped at 0.3": {**SGD, "accumulate": 2, "clip": 0.3},
    "SGD, bf16-mixed": {**SGD, "precision": "bf16-mixed"},
    "SGD, resumed after batch 9 of 12": {**SGD, "shuffle": True, "resume": True},
}


def last_loss(kind: str, **options: Any) -> float:
    """Train one case with one contender."""
    stock = None
    if kind == "Lightning DeepSpeedStrategy":
        stock = StockOnCPU(stage=STAGE)
    elif kind == "Lightning DDPStrategy":
        stock = DDPStrategy(process_group_backend="gloo")
    return train(f"zero_{STAGE}" if kind == "kexue Zero" else "ddp", stock=stock, **options)["losses"][-1]


def losses(kind: str, folder: str) -> dict[str, float]:
    """Train every case with one contender; runs in each process."""
    found: dict[str, float] = {}
    for name, case in CASES.items():
        options = dict(case)
        if options.pop("resume", False) and kind != UNBROKEN:
            path = f"{folder}/{kind}.ckpt"
            last_loss(kind, **options, save=path, save_at_step=9, max_steps=10)
            options["resume"] = path
        found[name] = last_loss(kind, **options)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {kind: run_ranks(losses, 2, kind, folder)[0] for kind in CONTENDERS}
    rows = [{"case": name, **{kind: f"{found[kind][name]:.7f}" for kind in CONTENDERS}} for name in CASES]
    report("last training loss on two CPU processes, stage 2", rows, options.json)


if __name__ == "__main__":
    main()
