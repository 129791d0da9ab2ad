"""Show the state of submitted jobs and how far their runs are.

usage: kexue status [RUN ...]

  kexue status                     all jobs of the runs below ./runs
  kexue status 1234                one job, or all of an array
  kexue status runs/NAME/1234      the same by its run directory
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

from ..errors import InputError


def run(args: list[str]) -> int:
    """Print two lines for each job; nothing heavy is imported."""
    from .jobs import find

    jobs = find(args)
    if not jobs:
        print("no jobs below ./runs; kexue submit cluster=slurm starts one")
    for job in jobs:
        try:
            state, detail = job.state()
        except InputError as error:  # a cluster that does not answer hides no other job
            state, detail = "UNKNOWN", f"({error})"
        print(" ".join(filter(None, [f"{job.id:<12}", f"{state:<10}", detail])))
        print(f"{'':<12} {', '.join([*progress(Path(job.run_dir)), job.run_dir])}")
    return 0


def progress(folder: Path) -> list[str]:
    """The last logged step and the newest checkpoint of a run, as far as there are any."""
    found = []
    metrics, last = folder / "metrics.csv", folder / "checkpoints" / "last.ckpt"
    if metrics.is_file():
        with metrics.open(newline="", encoding="utf-8") as file:
            steps = [int(row["step"]) for row in csv.DictReader(file) if (row["step"] or "").isdecimal()]
        if steps:
            found.append(f"step {max(steps)}")
    if last.is_symlink() and last.exists():
        minutes = (time.time() - last.lstat().st_mtime) / 60
        found.append(f"checkpoint {last.readlink().stem} ({minutes:.0f} min ago)")
    return found
