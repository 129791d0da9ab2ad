"""Jobs that `kexue submit` started: where their runs lie, what state they are in, how they are ended.

A run directory holds `job.json`. Every job is found below `runs` by its id: a run directory is named by it, or a link
of that name leads to one that was named otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError
from ..signals import PREEMPTED
from .batch import EXIT_CODE_FILE
from .run_dir import ROOT

JOB_FILE = "job.json"
ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"),
    *("DEADLINE", "GONE"),
}
"""States after which nothing more comes of a job."""

_FORMAT = "%T|%M|%l|%N|%r"


@dataclass(frozen=True)
class Job:
    """One job with one run.

    Attributes:
        scheduler: slurm or local.
        id: of the job; `ARRAY_TASK` for one of an array.
        run_dir: its run directory, absolute.
        log: what its tasks print.
        pid: of the shell that runs it on this machine; None on a cluster.
        cancelled: whether `kexue cancel` ended it.
    """

    scheduler: str
    id: str
    run_dir: str
    log: str
    pid: int | None = None
    cancelled: bool = False

    def write(self) -> None:
        """Put it down in its run directory."""
        folder = Path(self.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{JOB_FILE}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / JOB_FILE)

    def state(self) -> tuple[str, str]:
        """The state, in SLURM's words, and a few words on it."""
        state, detail = self._local_state() if self.scheduler == "local" else self._slurm_state()
        if state != "GONE":
            return state, detail
        # The scheduler knows nothing of it any more: its script wrote down how it ended.
        with contextlib.suppress(OSError, ValueError):
            code = int((Path(self.run_dir) / EXIT_CODE_FILE).read_text())
            ended = {0: "COMPLETED", PREEMPTED: "PREEMPTED"}.get(code, "FAILED")
            return ("CANCELLED", "") if self.cancelled and code else (ended, f"exit code {code}" if code else "")
        return ("CANCELLED", "") if self.cancelled else ("GONE", "ended without an exit code; see the log")

    def cancel(self) -> None:
        """Ask it to stop, which lets it save, and take it out of the queue."""
        Job(**{**asdict(self), "cancelled": True}).write()
        if self.scheduler == "slurm":
            _call("scancel", self.id)
        elif self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGTERM)

    def _local_state(self) -> tuple[str, str]:
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            # A number may have gone to another process: only the job's shell has its script's name among its words.
            if process.status() != psutil.STATUS_ZOMBIE and any(self.id in word for word in process.cmdline()):
                return "RUNNING", f"pid {self.pid}"
        return "GONE", ""

    def _slurm_state(self) -> tuple[str, str]:
        line = _call("squeue", "--noheader", "--states=all", f"--jobs={self.id}", f"--format={_FORMAT}", absent="")
        if line.strip():
            state, used, limit, nodes, reason = (line.splitlines()[0].split("|") + [""] * 5)[:5]
            if state == "PENDING":
                return state, f"({reason})"
            return state, f"on {nodes}, {used} of {limit}" if state == "RUNNING" else ""
        if shutil.which("sacct"):
            words = ("sacct", "-n", "-X", "-P", f"--jobs={self.id}", "--format=State")
            known = _call(*words, absent="").split()
            if known:
                return known[-1], ""
        return "GONE", ""


def find(words: Iterable[str]) -> list[Job]:
    """The jobs that words name, or all below `runs` without a word, the oldest first.

    Args:
        words: run directories, ids of jobs, or ids of arrays.

    Raises:
        InputError: nothing of that name.
    """
    found: list[Job] = []
    for word in words:
        name = word.removeprefix("run=")
        folder = Path(name).expanduser()
        files = [folder / JOB_FILE] if (folder / JOB_FILE).is_file() else []
        if not files and "/" not in name:
            files = [*ROOT.glob(f"*/{name}/{JOB_FILE}"), *ROOT.glob(f"*/{name}_*/{JOB_FILE}")]
        if not files:
            raise InputError(
                f"{name}: no job of that id below ./{ROOT} and no run directory with {JOB_FILE}; {_known()}"
            )
        found += map(_read, sorted(files))
    return found or [_read(file) for file in _all()]


def _all() -> list[Path]:
    return sorted(ROOT.glob(f"*/*/{JOB_FILE}"), key=lambda file: file.stat().st_mtime)


def _known() -> str:
    newest = [_read(file).id for file in _all()][-5:]
    return f"the newest are {', '.join(newest)}" if newest else "kexue submit makes one"


def _read(file: Path) -> Job:
    return Job(**json.loads(file.read_text(encoding="utf-8")))


def _call(*command: str, absent: str | None = None) -> str:
    """Run one of SLURM's commands; `absent` is the answer where it knows nothing of the job.

    Raises:
        InputError: the command is not on this machine, or fails and there is no such answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError as error:
        raise InputError(f"{command[0]} is not on this machine; type it on a login node of the cluster") from error
    if done.returncode:
        if absent is not None and "Invalid job id" in done.stderr:
            return absent
        raise InputError(
            f"{' '.join(command[:1])}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'failed'}"
        )
    return done.stdout
