"""TensorBoard, where somebody wants it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pytorch_lightning.loggers import TensorBoardLogger


def tensorboard_logger(folder: str | Path) -> TensorBoardLogger:
    """Make a logger that writes to `folder/tensorboard`; look with `tensorboard --logdir FOLDER`.

    Raises:
        ImportError: If tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("tensorboard is not installed: pip install tensorboard, or choose logger=wandb.")
    return TensorBoardLogger(save_dir=Path(folder), name="tensorboard", version="")
