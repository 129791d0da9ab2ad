"""Collectives on two CPU processes, 80 MB of float32: gloo's own against those of `kexue.strategies.gloo`.

OMP_NUM_THREADS=1 python benchmarks/gloo.py [--repeats 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import report

from kexue.strategies import gloo

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from ranks import run_ranks

ELEMENTS = 20_000_000


def measure(repeats: int) -> dict[str, list[float]]:
    """Time every collective in turn; runs in each process."""
    dist.init_process_group("gloo")
    whole, part = torch.randn(ELEMENTS), torch.randn(ELEMENTS // dist.get_world_size())
    calls = {
        "all-reduce, gloo": lambda: dist.all_reduce(whole),
        "all-gather, gloo": lambda: dist.all_gather_into_tensor(whole, part),
        "all-gather, kexue": lambda: gloo.all_gather_into_tensor(whole, part),
        "reduce-scatter, gloo": lambda: dist.reduce_scatter_tensor(part, whole),
        "reduce-scatter, kexue": lambda: gloo.reduce_scatter_tensor(part, whole),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        {"collective": name, "median ms": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in run_ranks(measure, 2, options.repeats)[0].items()
    ]
    report("collectives of 80 MB on two CPU processes", rows, options.json)


if __name__ == "__main__":
    main()
