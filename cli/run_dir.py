"""The run directory: where it is, what a run continues from, and the files that the command line writes there."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError
from .config import CONFIG_FILE
from .ranks import INTERACTIVE_JOBS, inherited_run_dir, is_main_process

ROOT = Path("runs")
JOBS = "jobs"
"""Folder beside the run directories of an experiment, for batch scripts and logs."""
METRICS_FILE = "metrics.json"
PROVENANCE_FILE = "provenance.json"
_STARTED_BY_OTHERS = ("WORLD_SIZE", "LOCAL_RANK", "NODE_RANK")


@dataclass(frozen=True)
class Place:
    """Where a run writes and what it starts from.

    Attributes:
        folder: the run directory, absolute.
        checkpoint: the checkpoint to continue from; None starts anew.
        assets: what the data module of that checkpoint's run saved; None when there is nothing.
    """

    folder: Path
    checkpoint: Path | None = None
    assets: Path | None = None


def open_run(run_dir: str | int | None, name: str, resume: str | None) -> Place:
    """Choose the run directory and the checkpoint to continue from; the main process makes the directory.

    Args:
        run_dir: as configured; None names it `runs/NAME/JOB` with the cluster's job id or else the clock.
        name: of the experiment.
        resume: "auto" (newest complete checkpoint, if any), None (anew) or a path.

    Raises:
        InputError: a run is there but `resume` is null; no checkpoint at the path; no name that all processes know.
    """
    inherited = inherited_run_dir()
    folder = inherited or _choose(run_dir, name)
    if inherited is None and is_main_process():
        _check_new(folder, resume)
        folder.mkdir(parents=True, exist_ok=True)
    return Place(folder, *_continue_from(folder, resume))


def starting_point(run_dir: Path | None, resume: str | None) -> Path | None:
    """The checkpoint of another run that a job is to start from, if one was given.

    Raises:
        InputError: as `open_run`, before the job is queued.
    """
    if run_dir is not None:
        _check_new(run_dir, resume)
    return None if resume in ("auto", None) else _continue_from(run_dir or ROOT, resume)[0]


def saved_checkpoint(run_dir: Path, choice: str) -> Path:
    """The checkpoint of a finished or running run.

    Args:
        choice: "best" (the last one where none was chosen), "last" or a path.

    Raises:
        InputError: there is none.
    """
    from ..strategies.checkpoints import is_complete, newest

    folder = run_dir / "checkpoints"
    candidates = {"best": [folder / "best.ckpt", folder / "last.ckpt"], "last": [folder / "last.ckpt"]}
    found = next((path for path in candidates.get(choice, [Path(choice)]) if is_complete(path)), None)
    if found is None and choice in candidates:
        found = newest(folder)
    if found is None:
        raise InputError(f"checkpoint={choice}: no complete checkpoint there; use best, last or a path in {folder}")
    return found.resolve()


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the resolved config."""
    write_text(folder / CONFIG_FILE, yaml.safe_dump(dict(config), allow_unicode=True, sort_keys=False))


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write where the run comes from: code, data, versions."""
    write_text(folder / PROVENANCE_FILE, json.dumps(provenance, indent=2, ensure_ascii=False) + "\n")


def write_metrics(folder: Path, metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Merge metrics into `metrics.json`, flat and sorted; a value that is not finite becomes null.

    Returns:
        All metrics in the file.
    """
    path = folder / METRICS_FILE
    try:
        merged = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        merged = {}
    merged.update({key: float(value) if math.isfinite(value) else None for key, value in metrics.items()})
    merged = dict(sorted(merged.items()))
    write_text(path, json.dumps(merged, indent=2, ensure_ascii=False) + "\n")
    return merged


def job_id() -> str | None:
    """The cluster's id of this job, the same after a requeue; None outside a batch job."""
    environment = os.environ
    if environment.get("SLURM_JOB_NAME") in INTERACTIVE_JOBS:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '0')}"
    return environment.get("SLURM_JOB_ID")


def _choose(run_dir: str | int | None, name: str) -> Path:
    if run_dir is not None:
        folder = Path(str(run_dir)).expanduser().resolve()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"run_dir={folder} is a file; give a folder")
        return folder
    job = job_id()
    if job is not None:
        return (ROOT / name / job).resolve()
    if any(variable in os.environ for variable in _STARTED_BY_OTHERS):
        raise InputError("several processes were started from outside and need one run directory; type run_dir=PATH")
    clock = time.strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        folder = (ROOT / name / (clock if number == 1 else f"{clock}-{number}")).resolve()
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _check_new(folder: Path, resume: str | None) -> None:
    if resume is None and (folder / CONFIG_FILE).exists():
        raise InputError(
            f"run_dir={folder} holds a run already; continue it with resume=auto or choose another run_dir"
        )


def _continue_from(folder: Path, resume: str | None) -> tuple[Path | None, Path | None]:
    from ..strategies.checkpoints import is_complete, newest

    if resume is None:
        return None, None
    checkpoint = newest(folder / "checkpoints") if resume == "auto" else Path(resume).expanduser().resolve()
    if checkpoint is None:
        return None, None
    if not is_complete(checkpoint):
        raise InputError(f"resume={resume}: no complete checkpoint there; use auto, null or a path in RUN/checkpoints")
    assets = checkpoint.resolve().parent.parent / "assets"
    return checkpoint, assets if assets.is_dir() else None


def write_text(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
