"""What a process knows about its place among the processes of a run before a Trainer exists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError

RUN_DIR_VARIABLE = "KEXUE_RUN_DIR"
INTERACTIVE_JOBS = ("bash", "interactive")
"""Names of SLURM jobs that are a shell, in which many runs may be started."""
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_main_process() -> bool:
    """True in the one process that prints and writes: every rank variable that is set says 0."""
    return all(os.environ.get(name, "0") in ("", "0") for name in _RANK_VARIABLES)


def rank() -> int:
    """The number of this process among all of the run, by what started it; 0 where nothing says."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if os.environ.get(name)), 0)


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


def leave_message(line: str) -> bool:
    """In the process of another rank: hand `line` to the main process, which alone speaks to the user.

    Returns:
        Whether there is one: processes started by srun, torchrun and the like have to speak for themselves.
    """
    if not os.environ.get(RUN_DIR_VARIABLE):
        return False
    _message_file(os.getpid()).write_text(line, encoding="utf-8")
    return True


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


@dataclass(frozen=True)
class Started:
    """The processes that something outside has started for this run.

    Attributes:
        by: srun, torchrun or deepspeed.
        nodes: machines.
        per_node: processes on each machine.
    """

    by: str
    nodes: int
    per_node: tuple[int, ...]


def adopt_processes(trainer: dict[str, object]) -> None:
    """Make the processes that srun, torchrun or the DeepSpeed launcher started known to Lightning, and check their
    number against the config: with a wrong one they would wait for each other without end.

    Args:
        trainer: the section of the config.

    Raises:
        InputError: other numbers of machines or devices in the config, or ranks that nobody has started.
    """
    started = _started()
    if started is None:
        return
    count = sum(started.per_node)
    if len(set(started.per_node)) > 1:
        spread = "+".join(map(str, started.per_node))
        raise InputError(
            f"{started.by} started {count} processes as {spread} on {started.nodes} machines; start as many on each"
            + (f": srun --ntasks-per-node={count // started.nodes}" if started.by == "srun" else "")
        )
    per_node = started.per_node[0]
    devices = _count(trainer.get("devices"))
    if trainer.get("num_nodes") != started.nodes or devices not in (None, per_node):
        raise InputError(
            f"{started.by} started {count} processes on {started.nodes} machine(s), the config says "
            f"trainer.devices={trainer.get('devices')} trainer.num_nodes={trainer.get('num_nodes')}; "
            f"type trainer.devices={per_node} trainer.num_nodes={started.nodes}"
        )
    if started.by == "srun" and count > 1:
        # Lightning reads these, and takes a job of one of the two names for a shell, where each process is alone.
        os.environ["SLURM_NTASKS_PER_NODE"] = str(per_node)
        if os.environ.get("SLURM_JOB_NAME") in INTERACTIVE_JOBS:
            os.environ["SLURM_JOB_NAME"] = "kexue"
    if started.by == "deepspeed":
        os.environ.setdefault("NODE_RANK", os.environ.get("CROSS_RANK", "0"))


def _started() -> Started | None:
    environment = os.environ
    for by, name in (("torchrun", "LOCAL_WORLD_SIZE"), ("deepspeed", "LOCAL_SIZE")):
        if name in environment and "WORLD_SIZE" in environment:
            per_node = int(environment[name])
            nodes = int(environment["WORLD_SIZE"]) // per_node
            return Started(by, nodes, (per_node,) * nodes)
    if "SLURM_JOB_ID" not in environment:
        return None
    if environment.get("SLURM_STEP_TASKS_PER_NODE") and environment.get("SLURM_STEP_ID"):
        per_node = _tasks(environment["SLURM_STEP_TASKS_PER_NODE"])
        return Started("srun", len(per_node), per_node)
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if tasks > 1 and environment.get("SLURM_JOB_NAME") not in INTERACTIVE_JOBS:
        raise InputError(f"this batch job has {tasks} tasks and only one was started; type srun before kexue fit")
    return None


def _tasks(text: str) -> tuple[int, ...]:
    """SLURM's way to count tasks on each node: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return tuple(counts)


def _count(devices: object) -> int | None:
    """How many devices the trainer is to use on a machine; None where the machine decides."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len(devices.split(","))
    return int(devices) if isinstance(devices, int | str) and str(devices).isdecimal() else None
