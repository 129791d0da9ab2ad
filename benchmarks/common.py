"""What the benchmarks share: a clock, a device, runs in turn, medians with spreads, a table, a JSON file."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_device = torch.device("cpu")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device cpu|cuda`, for `use_device`."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def use_device(name: str) -> None:
    """Measure on this device."""
    global _device
    _device = torch.device(name)


def device() -> torch.device:
    """Where to measure; as a context, tensors and modules are made there. Not around what is timed: it takes time."""
    return _device


def on_gpu() -> bool:
    """Whether it is a GPU."""
    return _device.type == "cuda"


def now() -> float:
    """Seconds on the clock, when all that was asked of a GPU has been done."""
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(runs: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Call every run once, then all of them again, `repeats` times: what disturbs the machine disturbs all alike."""
    results: dict[str, list[T]] = {name: [] for name in runs}
    for repeat in range(repeats):
        names = list(runs) if repeat % 2 == 0 else list(reversed(runs))
        for name in names:
            results[name].append(runs[name]())
    return results


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and half the distance between the quartiles (0 for a single value)."""
    if len(values) < 2:
        return values[0], 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return statistics.median(values), (high - low) / 2


def report(name: str, rows: Sequence[Mapping[str, Any]], path: str | Path | None = None) -> None:
    """Print rows as a Markdown table and, with a path, write them as JSON beside what is known of the machine.

    Args:
        name: The benchmark's name.
        rows: One mapping a line; the keys of the first are the columns.
        path: JSON file to write.
    """
    print(f"\n### {name}\n")
    print(table(rows))
    if path is not None:
        machine = {
            "date": datetime.date.today().isoformat(),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        if on_gpu():
            machine |= {"gpu": torch.cuda.get_device_name(), "command": shown_command()}
        text = json.dumps({"name": name, "machine": machine, "rows": list(rows)}, indent=2, ensure_ascii=False)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")


def shown_command() -> str:
    """How this benchmark was called, without the file that it writes."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if "--json" in words:
        place = words.index("--json")
        words = words[:place] + words[place + 2 :]
    return "python benchmarks/" + " ".join(words)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a Markdown table; the keys of the first are the columns."""
    columns = list(rows[0])
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
