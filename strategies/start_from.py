"""Begin a run with what another one has learnt: weights of the same names, from any checkpoint."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ..errors import InputError
from .checkpoints import check_parameters, is_complete, shapes_of
from .reshape import read_saved
from .technique import Technique

log = logging.getLogger(__name__)


class StartFrom(Technique):
    """Take parts of a module over from another run. Card: docs/cards/start_from.md.

    Args:
        run: a run directory, of which the best checkpoint counts, or a checkpoint: a file, or a folder of ZeRO's.
        parts: patterns of the weights that are taken over; all that the module has of them must be there.
        new: patterns of weights among these that begin anew.

    Raises:
        InputError: no run; no checkpoint there; in `attach`, weights that are missing or of another shape.
    """

    def __init__(self, run: str | None = None, parts: Sequence[str] = ("encoder.*",), new: Sequence[str] = ()) -> None:
        if run is None:
            raise InputError("StartFrom(run=None): give the folder of a run, technique.start_from.run=runs/NAME/JOB")
        self.run = run
        self.parts = tuple(parts)
        self.new = tuple(new)

    def attach(self, module: pl.LightningModule) -> None:
        """Copy the weights, unless those of the run's own checkpoint are there already, from which it goes on."""
        if module.trainer.ckpt_path is not None:  # ZeRO reads its checkpoint only after this, and over what is copied
            return
        path = _checkpoint(Path(self.run).expanduser())
        saved = read_saved(path)
        _check_vocabulary(path, saved.rest, module)
        weights = {name: value for name, value in saved.state_dict().items() if _is_one_of(name, self.parts)}
        wanted = {
            name: tensor
            for name, tensor in module.state_dict(keep_vars=True).items()
            if _is_one_of(name, self.parts) and not _is_one_of(name, self.new)
        }
        if not wanted:
            raise InputError(
                f"StartFrom(parts={list(self.parts)}): {type(module).__name__} has no weights of these names; name "
                f"parts such as {next(iter(module.state_dict()), 'encoder')!r}"
            )
        # What the other run has besides, such as its head, is not asked for.
        used = {name: value for name, value in weights.items() if name in wanted}
        check_parameters(path, shapes_of(used), shapes_of(wanted))
        for name, tensor in wanted.items():
            _copy(tensor, used[name])
        log.info("%d weights from %s, %d there without a place here", len(used), path, len(weights) - len(used))


def _checkpoint(path: Path) -> Path:
    folder = path / "checkpoints"
    for found in (folder / "best.ckpt", folder / "last.ckpt", path):
        if found.exists() and is_complete(found):
            return found.resolve()
    raise InputError(f"StartFrom(run={str(path)!r}): no complete checkpoint there; give the folder of a run that ended")


def _check_vocabulary(path: Path, rest: dict[str, Any], module: pl.LightningModule) -> None:
    """Refuse weights for other token ids: their shapes may well be the same."""
    data: Any = getattr(module.trainer, "datamodule", None)
    here = data.fingerprint().get("vocabulary") if hasattr(data, "fingerprint") else None
    states = [value for value in rest.values() if isinstance(value, dict) and "must_match" in value]
    there = states[0]["must_match"].get("vocabulary") if states else None
    if here and there and here != there:
        raise InputError(
            f"{path} was trained with another vocabulary; use data.vocab_file=RUN/assets/vocab.txt of its run"
        )


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@torch.no_grad()
def _copy(target: Tensor, value: Tensor) -> None:
    with _whole(target):
        target.copy_(value)


@contextmanager
def _whole(tensor: Any) -> Iterator[None]:
    """Bring a parameter together that ZeRO stage 3 has cut, and cut it again; each process writes the same values."""
    cut = hasattr(tensor, "ds_shape")
    if cut:
        tensor.all_gather()
    yield
    if cut:
        tensor.partition(has_been_updated=True)
