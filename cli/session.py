"""The objects of a run, made from its config: data, model, callbacks, trainer; and weights put into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.utilities.model_helpers import is_overridden

from ..callbacks.provenance import data_state, git_state, versions
from ..callbacks.wandb_run import WandbRun
from ..data.base import KexueDataModule
from ..errors import InputError
from .errors import one_line
from .run_dir import write_config, write_provenance
from .targets import build, check_arguments, resolve


class RunRecord(pl.Callback):
    """Puts what a run is where it can be read: `config.yaml`, `provenance.json`, and the loggers once all are up.

    A continued run writes the file only when its checkpoint has been accepted: the config of the run that was there
    before stays readable if it was not.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self.config = config
        self.folder = folder
        self._known: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell the loggers, before Lightning tells them the hyperparameters of the module alone."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        about = {**self.config, "family": family(self.config), "provenance": self._provenance(trainer)}
        for logger in trainer.loggers:
            if isinstance(logger, WandbRun):
                logger.log_config(about)
            else:
                logger.log_hyperparams(dict(self.config))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the files."""
        if trainer.is_global_zero:
            write_config(self.folder, self.config)
            write_provenance(self.folder, self._provenance(trainer))

    def _provenance(self, trainer: pl.Trainer) -> dict[str, Any]:
        if not self._known:
            data: Any = getattr(trainer, "datamodule", None)
            known = isinstance(data, KexueDataModule)
            self._known = {
                "git": git_state(),
                "data": data_state(data.source_files(), data.num_rows()) if known else None,
                "versions": versions(),
                "world_size": trainer.world_size,
            }
        return self._known


class Predictions(pl.Callback):
    """Collects what `predict_step` returns, as it is: Lightning would walk through the records to move tensors."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        """Keep the records of a batch."""
        self.records.extend(outputs)


def make_data(config: Mapping[str, Any], assets: Path | None) -> KexueDataModule:
    """Build the data module and let it read what decides the model's shape.

    Args:
        config: the whole plain config.
        assets: folder to take that from instead; None reads the training data.
    """
    data = build(config["data"], "data")
    if not isinstance(data, KexueDataModule):
        raise InputError(f"data._target_: {type(data).__name__} is no KexueDataModule; derive it from kexue.data.base")
    if assets is not None:
        data.load_assets(assets)
    data.prepare()
    return data


def make_model(config: Mapping[str, Any], data: KexueDataModule) -> pl.LightningModule:
    """Build the model; arguments that the data decide may be absent from its config.

    Raises:
        InputError: a config value contradicts the data, or arguments are missing.
    """
    node, decided = dict(config["model"]), data.model_arguments()
    for key, value in decided.items():
        given = node.pop(key, None)
        if given is not None and given != value:
            raise InputError(
                f"model.{key}={one_line(str(given), 60)}: the data say {one_line(str(value), 60)}; "
                f"remove model.{key} or change data.*"
            )
    check_arguments(resolve(node["_target_"], "model"), {**node, **decided}, "model")
    model = build(node, "model", **decided)
    if not isinstance(model, pl.LightningModule):
        raise InputError(f"model._target_: {type(model).__name__} is no LightningModule")
    return model


def make_strategy(config: Mapping[str, Any]) -> Any:
    """Build the strategy with the techniques in the order in which they were given."""
    return build(config["strategy"], "strategy", techniques=make_parts(config, "technique"))


def make_parts(config: Mapping[str, Any], group: str) -> list[Any]:
    """Build the entries of a group of named parts (callbacks, loggers, techniques); one set to null is left out."""
    return [build(node, f"{group}.{name}") for name, node in config[group].items() if node is not None]


def make_trainer(
    config: Mapping[str, Any],
    folder: Path,
    *,
    strategy: Any,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Any] = (),
    **overrides: Any,
) -> pl.Trainer:
    """Build Lightning's Trainer.

    Raises:
        InputError: a combination of arguments that Lightning refuses.
    """
    arguments = {**config["trainer"], **overrides}
    if arguments.get("enable_progress_bar") is False:  # with one among the callbacks, Lightning refuses these words
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    try:
        return pl.Trainer(
            **arguments,
            strategy=strategy,
            callbacks=list(callbacks),
            logger=list(loggers) or False,
            default_root_dir=str(folder),
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            use_distributed_sampler=False,
        )
    except InputError:
        raise
    except (ValueError, MisconfigurationException) as error:
        raise InputError(f"trainer: {one_line(error)}") from error


def family(config: Mapping[str, Any]) -> str:
    """The package that a model comes from, such as "extraction": models of one family share a dashboard."""
    parts = str(config["model"].get("_target_", "")).split(".")
    return parts[2] if parts[:2] == ["kexue", "lightning_modules"] and len(parts) > 3 else "other"


def has_test(model: pl.LightningModule, data: KexueDataModule) -> bool:
    """Whether there is a test to run."""
    return is_overridden("test_step", model) and is_overridden("test_dataloader", data)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain numbers."""
    return {key: float(value) for key, value in metrics.items()}
