"""What a study hands back: tables, remarks and figures, free of how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Value = str | int | float


@dataclass(frozen=True)
class Table:
    """Rows of plain values; numbers stay numbers, so that files keep every digit.

    Attributes:
        name: also of its file.
        title: what it shows.
        columns: heads, units in brackets.
        rows: one value for each column.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]

    def records(self) -> list[dict[str, Value]]:
        """The rows as dicts."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Findings:
    """Tables, remarks in whole sentences, and functions that draw into matplotlib's axes, by name."""

    tables: Sequence[Table]
    remarks: Sequence[str] = ()
    figures: dict[str, Callable[[Axes], None]] = field(default_factory=dict)


def draw(figures: dict[str, Callable[[Axes], None]], folder: Path) -> list[Path]:
    """Write each figure as FOLDER/NAME.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for name, plot in figures.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        plot(figure.add_subplot())
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=120)
    return written
