"""Figures and images of a run: one way to write them to the run directory and to show them in every logger."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "plots"


def as_grid(images: Tensor) -> np.ndarray:
    """Lay images out in a near square.

    Args:
        images: `(H, W)`, `(C, H, W)` or `(N, C, H, W)` with 1 or 3 channels, values 0 to 1.

    Returns:
        Bytes `(H', W', 3)`, one pixel between images.

    Raises:
        InputError: If the shape is another.
    """
    images = images.detach().float().cpu()
    stack = images[None, None] if images.dim() == 2 else images[None] if images.dim() == 3 else images
    if stack.dim() != 4 or stack.shape[1] not in (1, 3):
        raise InputError(f"a picture of shape {tuple(images.shape)}: use (H, W), (C, H, W) or (N, C, H, W), C 1 or 3.")
    number, _, height, width = stack.shape
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, np.uint8)
    for index, image in enumerate(stack.clamp(0, 1).mul(255).round().byte().numpy()):
        top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
        grid[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return grid


def save_picture(picture: Figure | Tensor | np.ndarray, path: Path) -> None:
    """Write a matplotlib figure, a tensor of one or more images (see `as_grid`) or bytes `(H, W, 3)` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(picture, "savefig"):
        picture.savefig(path, dpi=150)  # type: ignore[union-attr]
        return
    from PIL import Image

    Image.fromarray(as_grid(picture) if isinstance(picture, Tensor) else np.asarray(picture)).save(path)


def log_picture(
    trainer: pl.Trainer, key: str, picture: Figure | Tensor | np.ndarray, filename: str | None = None
) -> Path | None:
    """Write a picture to `plots/` of the run directory and show it in W&B and TensorBoard, on the first process.

    Args:
        trainer: the run's; its root folder is the run directory.
        key: such as "val/samples".
        picture: see `save_picture`.
        filename: below `plots`; None: the key and the step, so that a series of pictures stays.

    Returns:
        Where it was written; None on other processes.
    """
    if not trainer.is_global_zero:
        return None
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    path = Path(trainer.default_root_dir) / FOLDER / (filename or f"{key}/step={step:08d}.png")
    save_picture(picture, path)
    for logger in trainer.loggers:
        _show(logger, key, path, step)
    return path


def _show(logger: Logger, key: str, path: Path, step: int) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_image(key, [str(path)], step=step)
    elif isinstance(logger, TensorBoardLogger):
        from PIL import Image

        logger.experiment.add_image(key, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")


class Pictures(pl.Callback):
    """Log what the module's `pictures()` returns, a mapping of keys to figures or image tensors, after validation.

    `pictures()` is called on every process (a model that is divided among them needs all to compute); the first one's
    pictures are kept.

    Args:
        every_n_epochs: Leave out the epochs between.

    Raises:
        InputError: If `every_n_epochs` is below 1, or the module offers no `pictures()`.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise InputError(f"Pictures(every_n_epochs={every_n_epochs}): use 1 or more.")
        self.every_n_epochs = every_n_epochs

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a module that has none."""
        if not callable(getattr(pl_module, "pictures", None)):
            raise InputError(f"Pictures: {type(pl_module).__name__} has no pictures(); leave this callback out.")

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw."""
        if trainer.sanity_checking or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        pictures: dict[str, Any] = pl_module.pictures()  # type: ignore[operator]
        for key, picture in pictures.items():
            log_picture(trainer, key, picture)
