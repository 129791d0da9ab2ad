"""Where a run comes from: the state of the code, the data it read, the versions it ran with."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

_WHOLE_BYTES = 64 * 2**20
_END_BYTES = 16 * 2**20
_PACKAGES = ("torch", "pytorch-lightning", "deepspeed", "wandb")


def git_state(folder: Path | str = ".") -> dict[str, Any] | None:
    """Commit, branch, number of changed files and remote (without a name or password in it) of a working tree.

    Returns:
        None outside of a repository, or without git.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        if not commit:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        remote = re.sub(r"//[^/@]*@", "//", git("remote", "get-url", "origin"))
        return {"commit": commit, "branch": git("branch", "--show-current"), "changed": len(changed), "remote": remote}
    except (OSError, subprocess.TimeoutExpired):
        return None


def file_state(path: Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file; of one above 64 MiB the hash of its first and last 16 MiB, and it says so."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(2**20):
                digest.update(block)
        else:
            digest.update(file.read(_END_BYTES))
            file.seek(-_END_BYTES, 2)
            digest.update(file.read(_END_BYTES))
    state = {"file": str(path), "bytes": size, "sha256": digest.hexdigest()}
    return state if size <= _WHOLE_BYTES else {**state, "sha256_of": "first and last 16 MiB"}


def data_state(files: Iterable[Path], rows: dict[str, int]) -> dict[str, Any]:
    """The files that a run reads, each once, and the rows that came of them; no files means a built-in source."""
    states = [file_state(path) for path in dict.fromkeys(files) if path.is_file()]
    together = hashlib.sha256("".join(state["sha256"] for state in states).encode()).hexdigest() if states else None
    return {"files": states, "sha256": together, "rows": rows}


def versions() -> dict[str, str]:
    """Python and the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
