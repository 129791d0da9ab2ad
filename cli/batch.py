"""The shell script of a job: what starts `kexue fit` in each task, and what its exit code leads to.

The script answers for what a task inside a container cannot: it passes on signals that reach only the shell, and it
requeues the job when the run has saved and left with exit code 75.
"""

from __future__ import annotations

import shlex
import sys
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
class Task:
    """What each task of a job runs, and where.

    Attributes:
        words: of `kexue fit`, complete but for `run_dir` and the seed of an array.
        cpus: of each task.
        folder: for scripts and logs, absolute; run directories are its siblings, named by the job's id.
        run_dir: the run directory, if another one was chosen.
        start: the checkpoint of another run to start from.
    """

    words: list[str]
    cpus: int
    folder: Path
    run_dir: Path | None = None
    start: Path | None = None

    def link(self, job: str) -> Path:
        """Where a job's run is found by its id."""
        return self.folder.parent / job

    def place(self, job: str) -> Path:
        """The run directory of a job."""
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
    job = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if cluster.seeds else "$SLURM_JOB_ID"
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
        "output": str(task.folder / ("%A_%a.log" if cluster.seeds else "%j.log")),
        **{key.replace("_", "-"): value for key, value in (cluster.sbatch or {}).items() if value not in (None, False)},
    }
    if cluster.seeds:
        more["array"] = f"0-{len(cluster.seeds) - 1}"
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
    more = ["\"run_dir='$run_dir'\""]
    if cluster.seeds:
        more.append('"seed=${seeds[$SLURM_ARRAY_TASK_ID]}"')
    if task.start is not None:
        more.append('"${resume[@]}"')
    fit = " ".join(filter(None, [launch, cluster.container, _command(cluster), *map(shlex.quote, task.words), *more]))
    return [
        f'job="{job}"',
        f"run_dir={run_dir}",
        f'mkdir -p "$run_dir" && rm -f "$run_dir/{EXIT_CODE_FILE}"',
        *([f"seeds=({' '.join(map(str, cluster.seeds))})"] if cluster.seeds else []),
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


def _command(cluster: Cluster) -> str:
    own = "kexue" if cluster.container else f"{shlex.quote(sys.executable)} -m kexue.cli"
    return f"{cluster.command or own} fit"
