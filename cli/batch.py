"""The shell script of a job: what starts `kexue fit` in each task, and what its exit code leads to.

The script answers for what a task inside a container cannot: it passes on signals that reach only the shell, and it
requeues the job when the run has saved and left with exit code 75.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..signals import PREEMPTED
from .cluster import Cluster

if TYPE_CHECKING:
    from submitit import SlurmExecutor

EXIT_CODE_FILE = "exit_code"
LOCAL_ID = "KEXUE_LOCAL_JOB"
"""Variable that holds the id of a job on this machine."""

# 128 + signal: a task that died of one of the signals before it could listen has lost nothing. Later nothing dies of
# them, unless the run has no callback that answers: such a job would come back again and again.
_UNHEARD = "138|140|143"
_UNHEARD_SECONDS = 120

# `wait` returns when a signal arrives, so it is asked again until the run has ended.
_LISTEN = """\
step= requeue=
trap '[ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1 USR2 TERM"""
_WAIT = """\
step=$!
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done"""

# Only a running job goes back into the queue: one that was cancelled gets SIGTERM as well.
_REQUEUE = f"""\
case $code in
    {PREEMPTED}) requeue=yes ;;
    {_UNHEARD}) [ "$SECONDS" -lt {_UNHEARD_SECONDS} ] && requeue=yes ;;
esac
if [ "$requeue" ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    echo "kexue: exit code $code, job $job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi"""


@dataclass(frozen=True)
class Array:
    """The runs of an array job.

    Attributes:
        numbers: one for each run, `$SLURM_ARRAY_TASK_ID` in the script.
        word: in shell, what the words of a run end with.
        setup: lines of shell before it.
        places: the run directory of each number; None names them by the job's id.
        parallel: how many run at a time; None: as many as the cluster admits.
    """

    numbers: Sequence[int]
    word: str
    setup: Sequence[str] = ()
    places: Mapping[int, Path] | None = None
    parallel: int | None = None

    @classmethod
    def of_places(cls, places: Mapping[int, Path], word: str, parallel: int | None) -> Array:
        """A run in each of these directories."""
        listed = " ".join(f"[{number}]={shlex.quote(str(place))}" for number, place in places.items())
        return cls(list(places), word, [f"places=({listed})"], places, parallel)

    @classmethod
    def of_seeds(cls, seeds: Sequence[int]) -> Array:
        """A run for each seed."""
        setup = [f"seeds=({' '.join(map(str, seeds))})"]
        return cls(range(len(seeds)), '"seed=${seeds[$SLURM_ARRAY_TASK_ID]}"', setup)

    def __str__(self) -> str:
        numbers = ",".join(map(str, self.numbers))
        if list(self.numbers) == list(range(self.numbers[0], self.numbers[-1] + 1)):
            numbers = f"{self.numbers[0]}-{self.numbers[-1]}"
        return f"{numbers}%{self.parallel}" if self.parallel else numbers


@dataclass(frozen=True)
class Task:
    """What each task of a job runs, and where.

    Attributes:
        words: of the command, complete but for `run_dir` and what differs in an array.
        cpus: of each task.
        folder: for scripts and logs, absolute; run directories are its siblings, named by the job's id.
        run_dir: the run directory, if another one was chosen.
        start: the checkpoint of another run to start from.
        array: the runs of an array job; None for one run.
        command: fit, or another command that knows its run directory by itself.
    """

    words: list[str]
    cpus: int
    folder: Path
    run_dir: Path | None = None
    start: Path | None = None
    array: Array | None = None
    command: str = "fit"

    def link(self, job: str) -> Path:
        """Where a job's run is found by its id."""
        return self.folder.parent / job

    def place(self, job: str) -> Path:
        """The run directory of a job."""
        if self.array and self.array.places:
            return self.array.places[int(job.rpartition("_")[2])]
        return self.run_dir or self.link(job)


def slurm_script(cluster: Cluster, task: Task, name: str) -> str:
    """The batch script for sbatch.

    Args:
        cluster: checked.
        task: what to run.
        name: of the job.
    """
    executor = make_executor(task.folder)
    executor.update_parameters(**_parameters(cluster, task, name))
    srun = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={task.cpus}", *cluster.srun]
    job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if task.array else "$SLURM_JOB_ID"
    command = _body(cluster, task, job, shlex.join(srun))
    ending = [_REQUEUE, f'echo "$code" > "$run_dir/{EXIT_CODE_FILE}"', 'exit "$code"']
    return executor._make_submission_file_text("\n".join([*command, *ending]), "")


def local_script(cluster: Cluster, task: Task) -> str:
    """The script that runs the same job on this machine; arguments as for `slurm_script`."""
    command = _body(cluster, task, f"${LOCAL_ID}", "")
    lines = ["#!/bin/bash", *_setup(cluster), *command, f'echo "$code" > "$run_dir/{EXIT_CODE_FILE}"', 'exit "$code"']
    return "\n".join([*lines, ""])


def make_executor(folder: Path) -> SlurmExecutor:
    """submitit's executor for SLURM, also where there is no SLURM: a script can be looked at anywhere.

    Raises:
        InputError: submitit is not installed.
    """
    try:
        from submitit import SlurmExecutor
    except ImportError as error:
        raise InputError("cluster=slurm needs submitit; type pip install 'submitit>=1.5,<1.6'") from error

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2

    return Executor(folder)


def _parameters(cluster: Cluster, task: Task, name: str) -> dict[str, Any]:
    """submitit's parameters; its own signal, log and comment are replaced."""
    more: dict[str, Any] = {
        "signal": f"USR1@{cluster.signal_seconds}",
        "requeue": True,
        "output": str(task.folder / ("%A_%a.log" if task.array else "%j.log")),
        **{key.replace("_", "-"): value for key, value in (cluster.sbatch or {}).items() if value not in (None, False)},
    }
    if task.array:
        more["array"] = str(task.array)
    minutes, memory = cluster.minutes(), cluster.memory()
    if memory is not None:
        more["mem"] = f"{memory}M"
    if minutes is not None:
        more["time"] = minutes
    return {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.tasks,
        "cpus_per_task": task.cpus,
        "gpus_per_node": cluster.gpus or None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "time": None,
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": _setup(cluster) or None,
        "additional_parameters": more,
    }


def _setup(cluster: Cluster) -> list[str]:
    return [
        *(f"module load {shlex.quote(module)}" for module in cluster.modules),
        *(f"export {name}={shlex.quote(str(value))}" for name, value in (cluster.environment or {}).items()),
        *cluster.setup,
    ]


def _body(cluster: Cluster, task: Task, job: str, launch: str) -> list[str]:
    run_dir = shlex.quote(str(task.run_dir)) if task.run_dir else f'{shlex.quote(str(task.folder.parent))}/"$job"'
    if task.array and task.array.places:
        run_dir = '"${places[$SLURM_ARRAY_TASK_ID]}"'
    more = ["\"run_dir='$run_dir'\""] if task.command == "fit" else []
    if task.array:
        more.append(task.array.word)
    if task.start is not None:
        more.append('"${resume[@]}"')
    words = [*map(shlex.quote, task.words), *more]
    fit = " ".join(filter(None, [launch, cluster.container, _command(cluster, task.command), *words]))
    return [
        f'job="{job}"',
        *(task.array.setup if task.array else ()),
        f"run_dir={run_dir}",
        f'mkdir -p "$run_dir" && rm -f "$run_dir/{EXIT_CODE_FILE}"',
        *(_start_from(task.start) if task.start else []),
        *([f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{task.cpus}}}"'] if cluster.device == "cpu" else []),
        _LISTEN,
        f"{fit} &",
        _WAIT,
    ]


def _start_from(checkpoint: Path) -> list[str]:
    """Once the run has checkpoints of its own, a requeued job continues from those."""
    word = shlex.quote(f"resume='{checkpoint}'")
    return ["resume=()", f'[ -e "$run_dir/checkpoints/last.ckpt" ] || resume=({word})']


def _command(cluster: Cluster, command: str) -> str:
    own = "kexue" if cluster.container else f"{shlex.quote(sys.executable)} -m kexue.cli"
    return f"{cluster.command or own} {command}"
