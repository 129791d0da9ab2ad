"""Logged values in one CSV file that outlives interruptions."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import nn


class CSVMetrics(Logger):
    """Write `metrics.csv`: a row for each logged step, a column for each key, in the order in which they first came.

    What is logged at one step by several callers shares a row. Rows reach the file at once and are never lost: a new
    column rewrites the file beside itself, and a later run in the same folder goes on below. When it trains again from
    an earlier step (a resumed run), rows of the earlier process from its first logged step on make way, because these
    steps are being written again; evaluating writes below and takes nothing away.

    Args:
        folder: Where `metrics.csv` lies.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}
        self._row_start = 0
        self._file: IO[str] | None = None
        self._old_rows = False
        self._trainer: pl.Trainer | None = None

    @property
    def save_dir(self) -> str:
        """The folder; Lightning calls it the trainer's `log_dir`."""
        return str(self.path.parent)

    @property
    def name(self) -> str | None:
        """None: there is one file in a run directory."""
        return None

    @property
    def version(self) -> str | None:
        """None, as for `name`."""
        return None

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `config.yaml` holds them."""

    @rank_zero_only
    def log_graph(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Remember the trainer. Lightning calls this before each run; a logger meets its trainer nowhere else."""
        self._trainer = model._trainer if isinstance(model, pl.LightningModule) else None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of a step."""
        row = {"step": "" if step is None else step, **metrics}
        file = self._file or self._open()
        if self._old_rows and step is not None and self._trainer is not None and self._trainer.state.fn == "fit":
            file = self._drop_from(step, metrics)
        merged = self._row | row
        if all(merged[key] == value for key, value in self._row.items()) and self._row:
            row = merged
            file.seek(self._row_start)  # same step: the row is written again, longer
        else:
            self._row_start = file.seek(0, os.SEEK_END)
        self._row = row
        new = [key for key in row if key not in self._columns]
        if new:
            rows = self._read(self._row_start)
            self._columns += new
            self._rewrite([*rows, row])
            return
        csv.writer(file, lineterminator="\n").writerow([row.get(name, "") for name in self._columns])
        file.truncate()
        file.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; it opens again when more is logged."""
        if self._file is not None:
            self._file.close()
        self._file = None
        self._row = {}  # another process may write below before this one does again

    def _open(self) -> IO[str]:
        """Open the file for adding; a row cut short by a crash goes."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        file = self._file = self.path.open("r+", newline="", encoding="utf-8")
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        if not self._columns:  # else: closed by finalize, and opened again by the same process
            self._columns = next(csv.reader([whole.partition("\n")[0]]), [])
            self._old_rows = bool(whole)
        if whole != text:
            file.truncate(len(whole.encode()))
        file.seek(0, os.SEEK_END)
        return file

    def _read(self, end: int | None = None) -> list[dict[str, Any]]:
        """Return the rows that lie before a position in the file."""
        text = self.path.read_bytes()[:end].decode("utf-8")
        return list(csv.DictReader(io.StringIO(text, newline="")))

    def _rewrite(self, rows: list[dict[str, Any]]) -> IO[str]:
        """Write all rows beside the file, give them its name, and go on there."""
        if self._file is not None:
            self._file.close()
        fresh = self.path.with_name(f".{self.path.name}.partial")
        with fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns, restval="", lineterminator="\n")
            writer.writeheader()
            for row in rows:
                self._row_start = file.tell()
                writer.writerow(row)
        fresh.replace(self.path)
        self._file = self.path.open("r+", newline="", encoding="utf-8")
        self._file.seek(0, os.SEEK_END)
        return self._file

    def _drop_from(self, step: int, metrics: Mapping[str, float]) -> IO[str]:
        self._old_rows = False
        self._row = {}
        rows = self._read()
        kept = [row for row in rows if not row["step"] or int(row["step"]) < step]
        for row in rows:
            known = {key: value for key, value in row.items() if value and key != "epoch"}
            if row["step"] == str(step) and not known.keys() & metrics.keys():
                # A validation that is repeated: the step itself is not, and both share a row.
                kept.append(row)
                self._row = {**known, "step": step}
        return self._rewrite(kept)
