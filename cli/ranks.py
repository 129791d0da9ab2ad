"""What a process knows about its place among the processes of a run before a Trainer exists."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN_DIR_VARIABLE = "KEXUE_RUN_DIR"
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_main_process() -> bool:
    """True in the one process that prints and writes: every rank variable that is set says 0."""
    return all(os.environ.get(name, "0") in ("", "0") for name in _RANK_VARIABLES)


def inherited_run_dir() -> Path | None:
    """The run directory that the main process chose, in a process that Lightning started for another rank."""
    folder = os.environ.get(RUN_DIR_VARIABLE)
    return Path(folder) if folder and not is_main_process() else None


@contextmanager
def shared_run_dir(folder: Path) -> Iterator[None]:
    """Let processes started within this context use `folder` too."""
    before = os.environ.get(RUN_DIR_VARIABLE)
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[RUN_DIR_VARIABLE]
        else:
            os.environ[RUN_DIR_VARIABLE] = before


def leave_message(line: str) -> None:
    """In the process of another rank: hand `line` to the main process, which alone speaks to the user."""
    if os.environ.get(RUN_DIR_VARIABLE):
        _message_file(os.getpid()).write_text(line, encoding="utf-8")


def take_message(pid: int) -> str | None:
    """In the main process: the line that the process `pid` left before it ended."""
    file = _message_file(pid)
    if not file.is_file():
        return None
    line = file.read_text(encoding="utf-8")
    file.unlink()
    return line


def _message_file(pid: int) -> Path:
    return Path(os.environ[RUN_DIR_VARIABLE]) / f".error-{pid}"


def leave_group() -> None:
    """Close the process group, when all processes are done with it.

    Left to the end of the interpreter, gloo's threads may abort a process while another one is still busy.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
