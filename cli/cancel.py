"""End submitted jobs; a running one saves first, so that it can be continued.

usage: kexue cancel RUN [RUN ...]

  kexue cancel 1234                one job, or all of an array
  kexue cancel runs/NAME/1234      the same by its run directory

The run goes on with the words it was submitted with and run_dir=FOLDER.
"""

from __future__ import annotations

from ..errors import InputError


def run(args: list[str]) -> int:
    """Cancel what has not ended."""
    from .jobs import ENDED, find

    if not args:
        raise InputError("kexue cancel: which? type a job id or a run directory; kexue status lists them")
    for job in find(args):
        state, _ = job.state()
        if state in ENDED:
            print(f"{job.id} has ended already ({state})")
        else:
            job.cancel()
            print(f"{job.id} cancelled; its run lies in {job.run_dir}")
    return 0
