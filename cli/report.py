"""What a run says at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

STAGES = ("train", "val", "test")
_SHOWN = (
    "config.yaml",
    "metrics.csv",
    "metrics.json",
    "checkpoints",
    "plots",
    "predictions",
    "report.html",
    "wandb",
    "log.txt",
)


def metrics_table(metrics: Mapping[str, float | None]) -> Table:
    """A row for each metric, a column for each stage that has any; `lr` and other keys without a stage stay out."""
    split = [key.partition("/") for key in metrics]
    stages = [stage for stage in STAGES if any(prefix == stage for prefix, _, _ in split)]
    table = Table("metric", *stages)
    for name in dict.fromkeys(name for prefix, _, name in sorted(split) if prefix in stages):
        table.add_row(name, *(_number(metrics.get(f"{stage}/{name}")) for stage in stages))
    return table


def print_report(metrics: Mapping[str, float | None], folder: Path) -> None:
    """Print the table and, as the last line, where everything lies."""
    Console().print(metrics_table(metrics))
    there = ", ".join(name for name in _SHOWN if (folder / name).exists())
    print(f"everything lies in {folder}: {there}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
