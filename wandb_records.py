"""What a W&B run holds on disk, read and shown by W&B's own `wandb leet`: its files have no other public reader.

The program behind that command is called without the Python around it, which takes hundredths of a second, not seconds.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError

_TIMEOUT = 120.0


def record_files(folder: Path, run_id: str | None = None) -> list[Path]:
    """The `.wandb` files below a run directory, the oldest first: each start of a run writes one of its own.

    Args:
        folder: run directory.
        run_id: of the W&B run; None takes all.
    """
    name = f"run-{run_id or '*'}.wandb"
    found = [path for kind in ("offline-run", "run") for path in (folder / "wandb").glob(f"{kind}-*/{name}")]
    return sorted(found, key=lambda path: path.parent.name.removeprefix("offline-"))


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """Read a `.wandb` file record by record, as `wandb leet inspect --json` prints them; a part cut short is left out.

    Raises:
        InputError: it cannot be read.
    """
    command = _leet("inspect", file, "--json")
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=_TIMEOUT)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no reason given"]
        raise InputError(f"{file}: not a record of W&B, or damaged ({reason[0]})")
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def show(file: Path) -> int:
    """Open the terminal view of a record until its user leaves it; return the exit code."""
    return subprocess.run(_leet("run", file)).returncode


def _leet(command: str, file: Path, *options: str) -> list[str]:
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        raise ImportError("wandb is not installed: pip install wandb")
    program = Path(spec.origin).parent / "bin" / "wandb-core"
    where = ["--run-file", str(file), str(file.parent.parent)]  # it reads no option after the folder
    return [str(program), "leet", command, "--no-observability", *options, *where]


def history(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The logged rows among records."""
    for record in records:
        if record.get("type") == "history":
            yield record["history"]["item"]
