"""Weights and config.json of a folder, or of a name on the hub.  No file is ever allowed to run code."""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ....errors import InputError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_FILES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_folder(name: str | Path, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The folder of that path, or else the local copy of what the hub has under that name.

    Raises:
        InputError: neither is there.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    folder = Path()
    try:
        for patterns in (["model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*.bin*"]):
            folder = Path(
                snapshot_download(str(name), revision=revision, cache_dir=cache_dir, allow_patterns=[CONFIG, *patterns])
            )
            if any((folder / file).is_file() for file in _FILES):
                break
    except (OSError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"from_pretrained({str(name)!r}): there is no such folder, and the hub gave nothing of that name "
            f"({reason}); give a folder with {CONFIG} and {WEIGHTS}, or a name such as 'google-bert/bert-base-chinese'"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give the folder of a pretrained model, with its {CONFIG}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object")
    return values


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name. Files are mapped: a tensor is read when it is used."""

    def __init__(self, folder: Path) -> None:
        file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
        if file is None:
            raise InputError(f"{folder}: no weights; one of {', '.join(_FILES)} must be there")
        paths = [file]
        if file.suffix == ".json":
            paths = [folder / name for name in sorted(set(read_json(file).get("weight_map", {}).values()))]
            if lost := [path.name for path in paths if not path.is_file()]:
                raise InputError(f"{file} lists files that are not there: {', '.join(lost)}")
        self._tensors: dict[str, Tensor] = {}
        self._handles: dict[str, Any] = {}
        for path in paths:
            if path.suffix == ".safetensors":
                handle = _open(path)
                self._handles |= dict.fromkeys(handle.keys(), handle)
            else:
                self._tensors |= _load(path)

    def __iter__(self) -> Iterator[str]:
        yield from self._handles
        yield from self._tensors

    def __len__(self) -> int:
        return len(self._handles) + len(self._tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._handles[name].get_tensor(name) if name in self._handles else self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        if name in self._handles:
            return tuple(self._handles[name].get_slice(name).get_shape())
        return tuple(self._tensors[name].shape)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no safetensors file or is damaged ({error}); fetch it again") from error


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch has saved; one in its format of before 2020 cannot be mapped and is read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is damaged, or holds objects that could run code, so it was not loaded; "
            f"save its tensors as {WEIGHTS}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no file of weights or is damaged; fetch it again") from error
    if not isinstance(state, dict) or (wrong := [k for k, v in state.items() if not isinstance(v, Tensor)]):
        held = f", such as {wrong[0]!r}" if isinstance(state, dict) else ""
        raise InputError(f"{path} holds other things than tensors{held}; save the model's state_dict() alone")
    return state


def write(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors, the latter last and under its name only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial = folder / f".{WEIGHTS}.partial"
    save_file(dict(tensors), partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)
