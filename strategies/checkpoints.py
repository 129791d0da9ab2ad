"""Checkpoints that appear whole or not at all, say what they are, and load no code.

A single process and DDP write a file; ZeRO writes a directory with one part per process and, last of all, a
description.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ..errors import InputError

KEY = "kexue"
"""Key under which a checkpoint carries its description and the position of the run."""

MANIFEST = "kexue.json"
"""Description of a checkpoint directory. It is written last: a directory without it is not complete."""

PART = "checkpoint"
"""Folder of the parts inside a checkpoint directory (DeepSpeed calls it a tag)."""


def partial_path(path: Path) -> Path:
    """Return the hidden neighbour that a checkpoint is written to before it is renamed."""
    return path.with_name(f".{path.name}.partial")


def sync_file(path: Path) -> None:
    """Make sure that the bytes of a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a checkpoint, file or directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def reason_of(error: BaseException) -> OSError:
    """Return why a file could not be written: below torch's own error lies the system's, with its number."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__cause__ or cause.__context__
    return OSError(cause.errno, cause.strerror) if isinstance(cause, OSError) else OSError(str(error) or repr(error))


def unwritten(path: Any, reason: OSError, writer: str = "") -> OSError:
    """Return the error for a checkpoint that could not be written; its number is that of the reason."""
    why = reason.strerror or str(reason)
    text = f"{path} could not be written{writer} ({why}); the checkpoints written before are untouched."
    error = OSError(text)
    error.errno = reason.errno
    return error


def publish(partial: Path, path: Path) -> None:
    """Give a complete checkpoint its name, in one step for whoever looks.

    Where a directory has the name already, it is moved aside first and deleted after: at every moment at least one of
    the two is there, and `newest` finds either.
    """
    if path.is_dir() and not path.is_symlink():
        aside = path.with_name(f"{path.name}.old")
        remove(aside)
        path.rename(aside)
        partial.rename(path)
        remove(aside)
    else:
        partial.replace(path)
    sync_file(path.parent)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint file beside its place, sync it to the disk, rename it; read tensors and plain data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the file. A failure (disk full, no permission) leaves what was there before."""
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO.save_checkpoint(storage_options=...) is not supported: leave it out.")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(path)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            publish(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file, never running code from it unless `weights_only=False` is asked for in so many words."""
        return read_file(Path(path), map_location=map_location, weights_only=weights_only is not False)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete the file."""
        remove(Path(path))


def read_file(path: Path, map_location: Any = "cpu", weights_only: bool = True, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file.

    Raises:
        InputError: If it is missing, a directory, cut off, no checkpoint, or holds more than tensors and plain data.
    """
    if path.is_dir():
        raise InputError(f"{path} is a directory, not a checkpoint file; read it with kexue.strategies.load_weights.")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; give a file of checkpoints/, or resume=auto for the newest.")
    try:
        return torch.load(path, map_location=map_location, weights_only=weights_only, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) or "Unsupported global" not in str(error):
            raise InputError(f"{path} is not a checkpoint or is damaged; resume from another one.") from error
        name = str(error).partition("GLOBAL ")[2].split(" ")[0] or "an object"
        raise InputError(
            f"{path} holds {name}, which could run code, so it was not loaded; "
            "if you trust its source, load it in a script with Trainer.fit(..., weights_only=False)."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path} is not a checkpoint or is damaged; resume from another one.") from error


def is_complete(path: Path) -> bool:
    """Tell whether a checkpoint is there as a whole: a file (named when done), or a directory with its description."""
    return path.is_file() or (path / MANIFEST).is_file()


def newest(folder: Path) -> Path | None:
    """Return the complete checkpoint of a folder that was written last, or None."""
    if not folder.is_dir():
        return None
    entries = [path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_symlink()]
    complete = [p for p in entries if is_complete(p) and (p.is_dir() or p.suffix == ".ckpt")]
    return max(complete, key=lambda p: (p / MANIFEST if p.is_dir() else p).stat().st_mtime_ns, default=None)


def describe(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself: `base`, `stage`, `world_size`, `step`, `epoch`, `module`, `techniques`,
    `loggers` (class to the id of its run) and `parameters` (name to shape); empty for one that kexue did not write.

    Raises:
        InputError: If it is missing, damaged or incomplete.
    """
    if path.is_dir():
        manifest = path / MANIFEST
        if not manifest.is_file():
            raise InputError(
                f"{path} is not a complete checkpoint ({MANIFEST} is missing); resume=auto takes the newest."
            )
        return json.loads(manifest.read_text(encoding="utf-8"))
    return read_file(path, mmap=True).get(KEY, {}).get("description", {})


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Make `torch.load` refuse code inside, also where a library asks for the opposite (DeepSpeed does)."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def synced_checkpoint_engine() -> Any:
    """Make the object through which DeepSpeed reads and writes files: synced, and without running code from them."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class SyncedCheckpointEngine(TorchCheckpointEngine):
        failure: OSError | None = None

        def save(self, state_dict: Any, path: str) -> None:
            # An error on one process must not leave the others waiting: it is kept, and raised by all of them.
            try:
                with Path(path).open("wb") as file:
                    torch.save(state_dict, file)
                    file.flush()
                    os.fsync(file.fileno())
            except (OSError, RuntimeError) as error:
                self.failure = reason_of(error)

        def load(self, path: str, map_location: Any = None) -> Any:
            with tensors_only():
                return torch.load(path, map_location=map_location)

    return SyncedCheckpointEngine()


def shapes_of(state: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the shape of each entry of a `state_dict`; a tensor that ZeRO-3 has divided keeps its full one aside."""
    return {name: list(getattr(v, "ds_shape", getattr(v, "shape", ()))) for name, v in state.items()}


def check_parameters(path: Path, saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Compare names and shapes of a checkpoint's weights with those of the module it is to be loaded into.

    Args:
        path: The checkpoint, for the message.
        saved: Name to shape in the checkpoint.
        present: Name to shape in the module.

    Raises:
        InputError: On the first difference of each kind, with the counts.
    """
    missing = sorted(set(present) - set(saved))
    unused = sorted(set(saved) - set(present))
    shapes = sorted(n for n in set(saved) & set(present) if tuple(saved[n]) != tuple(present[n]))
    if not (missing or unused or shapes):
        return
    parts = []
    if missing:
        near = difflib.get_close_matches(missing[0], unused, n=1)
        hint = f", nearest there: {near[0]}" if near else ""
        parts.append(f"{len(missing)} weights of the model are not in it (first: {missing[0]}{hint})")
    if unused:
        parts.append(f"{len(unused)} of its weights have no place (first: {unused[0]})")
    if shapes:
        first, there, here = shapes[0], tuple(saved[shapes[0]]), tuple(present[shapes[0]])
        parts.append(f"{len(shapes)} differ in shape (first: {first}, {there} against {here})")
    raise InputError(
        f"{path} is a checkpoint of another model: {'; '.join(parts)}. Use the config it was trained with."
    )
