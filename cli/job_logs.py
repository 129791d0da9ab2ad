"""Print what a submitted job has printed.

usage: kexue logs RUN [-f]

  kexue logs 1234                  a job id, or a run directory
  kexue logs 1234 -f               and go on until the job has ended
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import InputError

LOOK_SECONDS = 0.5
STATE_SECONDS = 5.0  # squeue is asked no more often


def run(args: list[str]) -> int:
    """Print the log."""
    from .jobs import ENDED, find

    follow = bool({"-f", "--follow"} & set(args))
    words = [word for word in args if word not in ("-f", "--follow")]
    if len(words) != 1:
        raise InputError("kexue logs: type one job id or run directory; kexue status lists them")
    jobs = find(words)
    if len(jobs) > 1:
        raise InputError(f"{words[0]} is an array; type one of {', '.join(job.id for job in jobs)}")
    (job,) = jobs
    log = Path(job.log)
    if not log.exists() and not follow:
        state, detail = job.state()
        print(f"{job.id} is {state} {detail}".rstrip() + "; its log will be " + str(log))
        return 0
    for text in lines(log, (lambda: job.state()[0] in ENDED) if follow else lambda: True):
        sys.stdout.write(text)
        sys.stdout.flush()
    return 0


def lines(log: Path, ended: Callable[[], bool]) -> Iterator[str]:
    """The text of a growing file, until `ended` says that nothing more comes."""
    position, looked, over = 0, float("-inf"), False
    while True:
        if log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(position)
                text = file.read()
                position = file.tell()
            if text:
                yield text
        if over:
            return
        if time.monotonic() - looked > STATE_SECONDS:
            looked = time.monotonic()
            over = ended()
            if over:
                continue  # what was written between the two looks
        time.sleep(LOOK_SECONDS)
