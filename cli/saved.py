"""A run that was trained before: its config, its assets and its weights, on one device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .config import CONFIG_FILE, load_run, plain, validate
from .run_dir import ROOT, saved_checkpoint

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from ..data.base import KexueDataModule


@dataclass(frozen=True)
class SavedRun:
    """A checked run: nothing of it has been built yet.

    Attributes:
        folder: the run directory, absolute.
        checkpoint: the checkpoint to use.
        config: plain and valid.
    """

    folder: Path
    checkpoint: Path
    config: dict[str, Any]

    def prepare(self, *more: pl.Callback) -> tuple[KexueDataModule, pl.LightningModule, pl.Trainer]:
        """Build data and model, load the weights, and make a trainer for one device, with `more` callbacks."""
        from pytorch_lightning import seed_everything

        from ..strategies import SingleDevice
        from ..strategies.reshape import put_weights
        from . import session

        if self.config["seed"] is not None:
            seed_everything(self.config["seed"], workers=True, verbose=False)
        assets = self.folder / "assets"
        data = session.make_data(self.config, assets if assets.is_dir() else None)
        model = session.make_model(self.config, data)
        model.configure_model()
        put_weights(model, self.checkpoint)
        # All callbacks, because some decide what is evaluated (averaged weights) or what comes of it (plots).
        callbacks = [*session.make_parts(self.config, "callbacks"), *more]
        trainer = session.make_trainer(
            self.config, self.folder, strategy=SingleDevice(), callbacks=callbacks, devices=1, num_nodes=1
        )
        return data, model, trainer


def open_saved(run: str, checkpoint: str, overrides: list[str]) -> SavedRun:
    """Find a run directory and check its config before anything is built.

    Raises:
        InputError: no run there, no checkpoint, or a config that is wrong or names a class that is not allowed.
    """
    folder = Path(run).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        runs = sorted(ROOT.glob(f"*/*/{CONFIG_FILE}"), key=lambda path: path.stat().st_mtime)
        newest = f"; the newest here is run={runs[-1].parent}" if runs else "; kexue fit makes one"
        raise InputError(f"run={run}: no {CONFIG_FILE} there, so it is not a run directory{newest}")
    config = plain(load_run(folder, overrides), folder.resolve())
    validate(config)
    return SavedRun(folder.resolve(), saved_checkpoint(folder.resolve(), checkpoint), config)
