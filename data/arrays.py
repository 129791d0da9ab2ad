"""Arrays in one file: written whole or not at all, read in place, so that all processes of a machine share its pages.

The layout is that of safetensors (a JSON header with the place of each array): plain data, nothing is unpickled. What
takes long to make of a published file is made once and kept in a cache, by the first process that needs it.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from ..errors import InputError
from .files import explain_write_errors, require_file

log = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray]
_DTYPES = {"U8": np.uint8, "BOOL": np.bool_, "I32": np.int32, "U32": np.uint32, "I64": np.int64, "F32": np.float32}


def save_arrays(arrays: Arrays, path: str | Path, about: Mapping[str, str]) -> None:
    """Write arrays and what they are, first beside the file, then moved into its place.

    Raises:
        InputError: the place cannot be written to.
    """
    path = Path(path).resolve()
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, beside, dict(about))
            beside.chmod(0o644)  # the writer leaves it to its owner alone, but a cache may be shared
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def open_arrays(path: str | Path, *about: Mapping[str, str]) -> dict[str, NDArray]:
    """Map the arrays of a file that holds one of these things into memory, read-only.

    Raises:
        InputError: no such file, a broken one, or one that holds something else.
    """
    path = require_file(path)
    try:
        content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        size = int(content[:8].view("<u8")[0])
        header = json.loads(content[8 : 8 + size].tobytes())
        found = header.pop("__metadata__", {})
        if found not in about:
            raise InputError(f"{path}: holds {found}, not {about[0]}; delete it, it is made again")
        arrays = {}
        for name, entry in header.items():
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            if end > len(content):
                raise ValueError(f"{name} ends at byte {end} of {len(content)}")
            arrays[name] = content[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: not a whole file of arrays ({error}); delete it, it is made again") from error
    return arrays


def cached_arrays(
    source: str | Path,
    cache_dir: str | Path | None,
    about: Mapping[str, str],
    make: Callable[[Path, Path], Arrays],
) -> Path:
    """Return the file made of a published one; it is made anew where that one, or `about`, has changed.

    Args:
        source: the published file.
        cache_dir: where such files are kept; None: `kexue` in the user's cache folder.
        about: what the arrays are.
        make: from the source, and the file for its bad rows (see `bad_rows_of`), to the arrays.

    Raises:
        InputError: no such source, a place that cannot be written to, or what `make` raises.
    """
    source = require_file(source).resolve()
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
    state = source.stat()
    key = json.dumps([str(source), state.st_size, state.st_mtime_ns, sorted(about.items())])
    path = folder / f"{source.name.split('.')[0]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        with explain_write_errors(path):
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.with_suffix(".lock").open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other processes wait here, and find the file there
            if not path.exists():
                log.info("making %s of %s", path, source)
                bad_rows_of(path).unlink(missing_ok=True)
                save_arrays(make(source, bad_rows_of(path)), path, about)
    return path


def bad_rows_of(path: Path) -> Path:
    """Where the bad rows of its source are listed, if there were any."""
    return path.with_suffix(".bad_rows.jsonl")


def default_cache() -> Path:
    """`kexue` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kexue"


def place_file(path: Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where that is on another disk; whole or not at all."""
    target = Path(target)
    with suppress(FileNotFoundError):
        if target.samefile(path):
            return
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with explain_write_errors(target):
            try:
                os.link(path, beside)
            except OSError:
                shutil.copyfile(path, beside)
            beside.replace(target)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


class Texts:
    """Many strings as one array of bytes and their borders."""

    def __init__(self, content: NDArray, borders: NDArray) -> None:
        self._content = content
        self._borders = borders

    @staticmethod
    def pack(texts: list[str]) -> dict[str, NDArray]:
        """Arrays `content` and `borders` of such strings."""
        encoded = [text.encode("utf-8") for text in texts]
        borders = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in encoded], out=borders[1:])
        return {"content": np.frombuffer(b"".join(encoded), dtype=np.uint8), "borders": borders}

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, number: int) -> str:
        return self._content[self._borders[number] : self._borders[number + 1]].tobytes().decode("utf-8")
