"""What a model predicts beside what is right, the errors first."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from ..errors import InputError
from .answers import gathered, has_answers
from .pictures import as_grid, save_picture

FOLDER = "predictions"
COLUMNS = ("right", "input", "gold", "predicted")
_GIVEN = ("text", "question", "passages")  # of a record: what is given, as opposed to what is to be found


def readable(value: object) -> str:
    """Say a predicted value in one line: a dataclass by its texts, the first one outside the brackets; no positions."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
        head, *rest = [readable(part) for part in parts if not isinstance(part, int) and part is not None] or [""]
        inner = ", ".join(part for part in rest if part)
        return f"{head} ({inner})" if inner else head
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {readable(child)}" for key, child in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return "; ".join(readable(child) for child in value)
    return str(value)


def record_row(gold: Any, predicted: Any) -> dict[str, Any]:
    """A row for a record and the record that a model made of it; the order of several findings does not count.

    A record that knows what is right of several things, and offers `accepts(predicted)`, is asked; one that has a
    method `judged` is compared as that gives it.
    """
    gold, predicted = (record.judged() if hasattr(record, "judged") else record for record in (gold, predicted))
    fields = [field.name for field in dataclasses.fields(gold)]
    names = [name for name in fields if name not in ("id", *_GIVEN)]
    texts = [[_texts(getattr(record, name)) for name in names] for record in (gold, predicted)]
    say = ["; ".join(dict.fromkeys(text for group in groups for text in group)) for groups in texts]
    if hasattr(gold, "accepts"):
        right = gold.accepts(predicted)
    else:
        right = [sorted(group) for group in texts[0]] == [sorted(group) for group in texts[1]]
    if not right and say[0] == say[1]:  # then it is the places that differ
        say = ["; ".join(str(getattr(record, name)) for name in names) for record in (gold, predicted)]
    given = " | ".join(readable(getattr(gold, name)) for name in _GIVEN if name in fields) or readable(gold)
    return {"right": right, "input": given, "gold": say[0], "predicted": say[1]}


def class_rows(outputs: Mapping[str, Tensor], batch: Any, names: list[str] | None) -> Iterator[dict[str, Any]]:
    """Rows for a classifier's batch: its image or text where the batch has one, the classes by name."""
    predicted, target = outputs["prediction"].tolist(), outputs["target"].tolist()
    given: Any = [""] * len(target)
    if isinstance(batch, Mapping):
        given = next(
            (batch[key] for key in ("text", "image") if key in batch and len(batch[key]) == len(target)), given
        )
    for item, found, right in zip(given, predicted, target, strict=True):
        say = [names[label] if names is not None and label < len(names) else str(label) for label in (right, found)]
        yield {"right": found == right, "input": item, "gold": say[0], "predicted": say[1]}


class PredictionTable(pl.Callback):
    """Write `predictions/test.jsonl` to the run directory after testing, and a table to W&B: errors first.

    It reads `{"prediction": (B,), "target": (B,)}` from what `test_step` returns. Where there is no such thing but the
    batch has `records`, it calls `predict_step` on some batches, evenly spread, and compares records. A module that
    offers neither has no table. Where a module finds but a part of what is annotated, its `expected(record)` is that.

    Args:
        max_rows: Rows of the table.
        num_batches: Batches of records that are predicted again for it.
        class_names: Names in the order of class numbers; None: the numbers.

    Raises:
        InputError: If an argument is out of range.
    """

    def __init__(self, max_rows: int = 200, num_batches: int = 8, class_names: list[str] | None = None) -> None:
        for name, value in (("max_rows", max_rows), ("num_batches", num_batches)):
            if value < 1:
                raise InputError(f"PredictionTable({name}={value}): use 1 or more.")
        self.max_rows = max_rows
        self.num_batches = num_batches
        self.class_names = class_names
        self._kept: dict[bool, list[dict[str, Any]]] = {}
        self._counts: dict[bool, int] = {}

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with nothing."""
        self._kept = {False: [], True: []}
        self._counts = {False: 0, True: 0}

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the batch's rows."""
        if has_answers(outputs):
            self._keep(class_rows(outputs, batch, self.class_names))
        elif isinstance(batch, Mapping) and "records" in batch and is_overridden("predict_step", pl_module):
            # Decided by the number of batches alone: all processes compute together or not at all.
            every = max(1, math.ceil(trainer.num_test_batches[dataloader_idx] / self.num_batches))
            if batch_idx % every == 0:
                found: Iterable[Any] = pl_module.predict_step(batch, batch_idx)
                gold: Iterable[Any] = map(getattr(pl_module, "expected", lambda record: record), batch["records"])
                self._keep(record_row(right, record) for right, record in zip(gold, found, strict=True))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the rows of all processes; the first one writes."""
        parts = gathered(trainer, (self._kept, self._counts))
        wrong, right = ([row for kept, _ in parts for row in kept[which]] for which in (False, True))
        rows = [*wrong, *right][: self.max_rows]
        if not rows or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        counts = {key: sum(count[which] for _, count in parts) for key, which in (("wrong", False), ("right", True))}
        lines = [{"wrong": counts["wrong"], "right": counts["right"]}]
        for number, row in enumerate(rows):
            if isinstance(row["input"], Tensor):
                image = f"images/{number:04d}.png"
                save_picture(row["input"], folder / image)
                row = {**row, "input": {"image": image}}
            lines.append(row)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "test.jsonl").write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_table("test/predictions", columns=list(COLUMNS), data=_cells(rows), step=step)

    def _keep(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self._counts[row["right"]] += 1
            kept = self._kept[row["right"]]
            if len(kept) < self.max_rows:
                item = row["input"]
                kept.append({**row, "input": item.detach().cpu() if isinstance(item, Tensor) else item})


def _texts(value: Any) -> list[str]:
    return [readable(child) for child in value] if isinstance(value, list | tuple) else [readable(value)]


def _cells(rows: list[dict[str, Any]]) -> list[list[Any]]:
    import wandb

    cells = [[row[column] for column in COLUMNS] for row in rows]
    return [[wandb.Image(as_grid(cell)) if isinstance(cell, Tensor) else cell for cell in row] for row in cells]
