"""What the benchmarks share: runs in turn, medians with spreads, a table, a JSON file."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


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
        text = json.dumps({"name": name, "machine": machine, "rows": list(rows)}, indent=2, ensure_ascii=False)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")


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
