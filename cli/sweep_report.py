"""What a sweep has found so far: a table, best point first, and a plot of parallel coordinates."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .points import Sweep

TABLE_FILE, PLOT_FILE = "table.csv", "parallel_coordinates.png"
MAX_SHOWN = 30


def rows_of(sweep: Sweep) -> list[dict[str, Any]]:
    """A row for each point: number, state, value of each key, metrics; finished ones first, the best on top."""
    rows = []
    for number in range(len(sweep.points)):
        values = dict(word.lstrip("+").split("=", 1) for word in sweep.chosen(number) or [])
        metrics = sweep.metrics(number) if sweep.finished(number) else {}
        state = "finished" if metrics else "begun" if (sweep.place(number) / "config.yaml").is_file() else "waits"
        rows.append({"point": f"{number:04d}", "state": state, **{k: values.get(k, "") for k in sweep.keys}, **metrics})
    sign = 1 if sweep.goal == "min" else -1

    def rank(row: dict[str, Any]) -> tuple[bool, float]:
        value = row.get(sweep.objective)
        return value is None, math.inf if value is None else sign * value

    return sorted(rows, key=rank)


def write_report(sweep: Sweep) -> list[dict[str, Any]]:
    """Write table and plot into the sweep's folder; many processes may do so, one after another or at once.

    A point that has ended meanwhile has written its own, which this one may have replaced: so it looks again.
    """
    rows: list[dict[str, Any]] = []
    while rows != (rows := rows_of(sweep)):
        _write(sweep, rows)
    return rows


def _write(sweep: Sweep, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    partial = sweep.folder / f".{TABLE_FILE}.{os.getpid()}.partial"
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(sweep.folder / TABLE_FILE)
    finished = [row for row in rows if row.get(sweep.objective) is not None]
    if finished:
        partial = sweep.folder / f".{os.getpid()}.{PLOT_FILE}"
        plot(finished, [*sweep.keys, sweep.objective], sweep.goal, partial)
        partial.replace(sweep.folder / PLOT_FILE)


def show(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> None:
    """Print the best points, and where everything lies."""
    table = Table("point", "state", *sweep.keys, sweep.objective, title=f"{sweep.name}, {sweep.goal} {sweep.objective}")
    for row in rows[:MAX_SHOWN]:
        value = row.get(sweep.objective)
        shown = "" if value is None else f"{value:.5g}"
        table.add_row(row["point"], row["state"], *(_short(row[key]) for key in sweep.keys), shown)
    Console().print(table)
    if len(rows) > MAX_SHOWN:
        print(f"and {len(rows) - MAX_SHOWN} more in {TABLE_FILE}")
    there = ", ".join(name for name in (TABLE_FILE, PLOT_FILE) if (sweep.folder / name).exists())
    done = sum(row["state"] == "finished" for row in rows)
    print(f"{done} of {len(rows)} points finished; everything lies in {sweep.folder}: {there}")


def plot(rows: Sequence[dict[str, Any]], columns: Sequence[str], goal: str, path: Path) -> None:
    """Draw a line for each point through an axis for each key, the objective last; better points are darker, on top.

    Args:
        rows: finished points.
        columns: names of the axes.
        goal: min or max.
        path: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    places = [_places([row[column] for row in rows]) for column in columns]
    scores = np.array([row[columns[-1]] for row in rows], dtype=float)
    order = np.argsort(scores if goal == "max" else -scores)  # the best is drawn last
    shade = np.linspace(0.15, 1.0, len(rows))
    figure, axes = plt.subplots(figsize=(2.2 + 1.9 * len(columns), 4.6), layout="constrained")
    colours = plt.get_cmap("viridis_r")
    for rank, index in enumerate(order):
        best = rank == len(rows) - 1
        heights = [heights[index] for heights, _ in places]
        axes.plot(heights, color=colours(shade[rank]), linewidth=2.6 if best else 1.2, alpha=1.0 if best else 0.75)
    for x, (_, ticks) in enumerate(places):
        axes.axvline(x, color="0.6", linewidth=1, zorder=0)
        for height, text in ticks:
            last = x == len(columns) - 1
            axes.annotate(
                text,
                (x, height),
                xytext=(6 if last else -6, 0),
                textcoords="offset points",
                ha="left" if last else "right",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            )
    axes.set_xticks(range(len(columns)), columns)
    axes.set_xlim(-0.45, len(columns) - 0.55)
    axes.set_yticks([])
    axes.set_title(f"{len(rows)} points, the best ({goal} {columns[-1]}) as a thick line", fontsize=10)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _places(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights from 0 to 1 for the values of an axis, and its ticks; by logarithm where numbers span decades."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        numbers = None
    if numbers is None or not all(map(math.isfinite, numbers)):
        names = sorted(set(map(str, values)))
        step = 1 / max(1, len(names) - 1)
        at = {name: 0.5 if len(names) == 1 else index * step for index, name in enumerate(names)}
        return [at[str(value)] for value in values], [(at[name], _short(name)) for name in names]
    low, high = min(numbers), max(numbers)
    if low == high:
        return [0.5] * len(numbers), [(0.5, _short(low))]
    logarithmic = low > 0 and high / low >= 30

    def height(number: float) -> float:
        if logarithmic:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)

    different = sorted(set(numbers))
    marks = different
    if len(different) > 6:
        shares = (0.0, 0.25, 0.5, 0.75, 1.0)
        marks = [low * (high / low) ** q if logarithmic else low + q * (high - low) for q in shares]
    return [height(number) for number in numbers], [(height(mark), _short(mark)) for mark in marks]


def _short(value: Any) -> str:
    try:
        text = f"{float(value):.4g}"
    except ValueError:
        text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."
