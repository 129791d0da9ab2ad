"""Which classes a classifier mistakes for which, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..errors import InputError
from .answers import gathered, has_answers
from .pictures import log_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_confusion_matrix(matrix: Tensor, class_names: Sequence[str]) -> Figure:
    """Draw counts, with the recall of each class at its row.

    Args:
        matrix: Counts `(C, C)`, true classes in rows, predicted ones in columns.
        class_names: `C` names.
    """
    from matplotlib.figure import Figure  # without pyplot no window system is needed

    classes = len(class_names)
    rows = matrix.sum(1)
    recall = matrix.diagonal() / rows.clamp(min=1)
    size = max(4.5, 0.5 * classes + 2)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow((matrix / rows.clamp(min=1)[:, None]).numpy(), cmap="Blues", vmin=0, vmax=1)
    for true in range(classes):
        for predicted in range(classes):
            count = int(matrix[true, predicted])
            if count:
                dark = count > 0.5 * float(rows[true])
                axes.text(predicted, true, str(count), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(classes), class_names, rotation=45 if max(map(len, class_names)) > 3 else 0)
    axes.set_yticks(range(classes), class_names)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(classes), [f"{100 * value:.1f} %" for value in recall.tolist()])
    right.set_ylabel("recall")
    right.tick_params(length=0)
    axes.set(xlabel="predicted class", ylabel="true class")
    accuracy = float(matrix.diagonal().sum() / matrix.sum().clamp(min=1))
    axes.set_title(f"{int(matrix.sum())} test samples, {100 * accuracy:.2f} % right")
    return figure


class ConfusionMatrixPlot(pl.Callback):
    """Write `plots/confusion_matrix.png` to the run directory after testing, and show it in the loggers that can.

    It reads `{"prediction": (B,), "target": (B,)}` from what `test_step` returns. Counts are exact over all processes.

    Args:
        class_names: Names in the order of class numbers; None: the numbers.
        filename: Name of the picture in `plots`.

    Raises:
        InputError: If `test_step` returns no such thing, or a class number has no name.
    """

    def __init__(self, class_names: Sequence[str] | None = None, filename: str = "confusion_matrix.png") -> None:
        self.class_names = list(class_names) if class_names is not None else None
        self.filename = filename
        self._pairs: list[Tensor] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with nothing."""
        self._pairs = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the batch's predictions and targets."""
        if not has_answers(outputs):
            raise InputError(
                "ConfusionMatrixPlot: test_step must return {'prediction': (B,), 'target': (B,)}; "
                "return them or leave this callback out."
            )
        self._pairs.append(torch.stack([outputs["prediction"].detach(), outputs["target"]]).long())

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count over all processes and draw on the first."""
        empty = torch.zeros(2, 0, dtype=torch.long, device=pl_module.device)
        pairs, self._pairs = torch.cat([empty, *self._pairs], 1).cpu(), []
        parts = gathered(trainer, torch.unique(pairs, dim=1, return_counts=True))
        classes = max(int(pairs.max()) + 1 if pairs.numel() else 0 for pairs, _ in parts)
        names = self.class_names or [str(number) for number in range(classes)]
        if classes > len(names):
            raise InputError(
                f"ConfusionMatrixPlot(class_names=...): {len(names)} names, but class {classes - 1} occurs."
            )
        matrix = torch.zeros(len(names), len(names), dtype=torch.long)
        for (predicted, true), counts in parts:
            matrix.index_put_((true, predicted), counts, accumulate=True)
        if trainer.is_global_zero and names:
            log_picture(trainer, "test/confusion_matrix", plot_confusion_matrix(matrix, names), self.filename)
