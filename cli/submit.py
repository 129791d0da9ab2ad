"""Send an experiment to a cluster, or run it here in the background.

usage: kexue submit cluster=slurm|local [cluster.KEY=VALUE ...] [experiment=NAME] [KEY=VALUE ...] [--dry-run]

  kexue submit experiment=gplinker_event cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8 cluster.time=24h
  kexue submit cluster=slurm cluster.device=cpu cluster.tasks_per_node=2      CPU processes, no GPU needed
  kexue submit cluster=slurm cluster.seeds=[1,2,3]                            one array job, a run for each seed
  kexue submit cluster=slurm ... --dry-run                                    print the batch script, queue nothing

All other words are those of kexue fit, which runs in each task. The job has one task per device; trainer.devices,
trainer.num_nodes and trainer.accelerator follow from cluster.*. The run directory is runs/NAME/JOB. A job that is
preempted or near its time limit saves, goes back into the queue, and continues in the same directory.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .batch import LOCAL_ID, Array, Task
from .cluster import Cluster
from .errors import one_line
from .jobs import Job
from .run_dir import JOBS

if TYPE_CHECKING:
    from .points import Sweep

_CHOSEN_HERE = ("cluster", "run_dir", "resume", "trainer.accelerator", "trainer.devices", "trainer.num_nodes")


def run(args: list[str]) -> int:
    """Submit; see the module's help."""
    from .batch import local_script, slurm_script
    from .cluster import trainer_words
    from .config import compose_run, plain, validate
    from .run_dir import ROOT, starting_point

    dry_run, words = "--dry-run" in args, [word for word in args if word != "--dry-run"]
    composed = compose_run(words)
    config = plain(composed, composed.run_dir or "runs")
    validate(config)
    if not config["cluster"]:
        raise InputError("cluster=... is missing; type cluster=slurm or cluster=local")
    cluster = Cluster(**config["cluster"])
    cluster.check()
    run_dir = Path(str(composed.run_dir)).expanduser().resolve() if composed.run_dir is not None else None
    if run_dir is not None and cluster.seeds:
        raise InputError(
            f"run_dir={run_dir} cluster.seeds: each seed has a run directory of its own; leave run_dir out"
        )
    task = Task(
        words=[*_words_of_fit(words), *trainer_words(cluster, config, words)],
        cpus=cluster.cpus(config),
        folder=(ROOT / config["name"] / JOBS).resolve(),
        run_dir=run_dir,
        start=starting_point(run_dir, config["resume"]),
        array=Array.of_seeds(cluster.seeds) if cluster.seeds else None,
    )
    if cluster.scheduler == "local":
        script = local_script(cluster, task)
    else:
        script = slurm_script(cluster, task, config["name"])
    if dry_run:
        print(script, end="")
        return 0
    task.folder.mkdir(parents=True, exist_ok=True)
    (_start_here if cluster.scheduler == "local" else _queue)(script, cluster, task)
    return 0


def _words_of_fit(words: list[str]) -> list[str]:
    keys = {word: word.partition("=")[0].lstrip("+~").partition("@")[0] for word in words}
    return [word for word, key in keys.items() if key not in _CHOSEN_HERE and not key.startswith("cluster.")]


def submit_points(sweep: Sweep, numbers: list[int], words: list[str], parallel: int | None, dry_run: bool) -> None:
    """Queue points of a sweep as one array job.

    Args:
        sweep: the sweep.
        numbers: of the points to run.
        words: `cluster=slurm` and `cluster.KEY=VALUE`.
        parallel: how many run at a time.
        dry_run: print the batch script, queue nothing.

    Raises:
        InputError: as `run`.
    """
    from .batch import slurm_script
    from .cluster import trainer_words
    from .config import compose_run, plain, validate
    from .run_dir import ROOT

    config = plain(compose_run([*sweep.words, *sweep.points[numbers[0]], *words]), "runs")
    validate(config)
    cluster = Cluster(**config["cluster"])
    cluster.check()
    if cluster.seeds:
        raise InputError(f"cluster.seeds={cluster.seeds}: in a sweep, seeds vary like anything else: seed=1,2,3")
    task = Task(
        words=[f"run={sweep.folder}", *trainer_words(cluster, config, sweep.words)],
        cpus=cluster.cpus(config),
        folder=(ROOT / sweep.name / JOBS).resolve(),
        array=Array.of_places(
            {number: sweep.place(number) for number in numbers}, '"point=$SLURM_ARRAY_TASK_ID"', parallel
        ),
        command="sweep",
    )
    script = slurm_script(cluster, task, f"{sweep.name}-sweep")
    if dry_run:
        print(script, end="")
        return
    task.folder.mkdir(parents=True, exist_ok=True)
    _queue(script, cluster, task)


def _queue(script: str, cluster: Cluster, task: Task) -> None:
    from .batch import make_executor

    executor = make_executor(task.folder)
    file = task.folder / f".{time.time_ns()}.sh"
    file.write_text(script, encoding="utf-8")
    try:
        output = subprocess.run(
            executor._make_submission_command(file), check=True, capture_output=True, text=True, timeout=120
        ).stdout
    except FileNotFoundError as error:
        raise InputError(
            "sbatch is not on this machine; type this on a login node of the cluster, or use cluster=local"
        ) from error
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "rror:" in line] or [error.stderr]
        raise InputError(f"sbatch refused the job: {one_line(said[0].partition('rror:')[2] or said[0])}") from error
    else:
        job = executor._get_job_id_from_submission_command(output)
        file = file.rename(task.folder / f"{job}.sh")
    finally:
        if file.name.startswith("."):
            file.unlink()
    ids = [f"{job}_{number}" for number in task.array.numbers] if task.array else [job]
    for name in ids:
        _record(Job("slurm", name, str(task.place(name)), str(task.folder / f"{name}.log")), task)
    size = f"{cluster.nodes} x {cluster.tasks} tasks" if cluster.nodes > 1 else f"{cluster.tasks} task(s)"
    size = f"{size} on {'CPUs' if cluster.device == 'cpu' else 'GPUs'}"
    _announce(job, f"{len(ids)} runs of {size}" if task.array else size, task, ids)


def _start_here(script: str, cluster: Cluster, task: Task) -> None:
    job = time.strftime("local-%Y%m%d-%H%M%S")
    while (task.folder / f"{job}.sh").exists():
        time.sleep(0.1)
        job = time.strftime("local-%Y%m%d-%H%M%S")
    file, log = task.folder / f"{job}.sh", task.folder / f"{job}.log"
    file.write_text(script, encoding="utf-8")
    with log.open("a") as output:
        process = subprocess.Popen(
            ["bash", str(file)],
            env={**os.environ, LOCAL_ID: job},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _record(Job("local", job, str(task.place(job)), str(log), pid=process.pid), task)
    _announce(job, f"{cluster.tasks} process(es) on this machine", task, [job])


def _record(job: Job, task: Task) -> None:
    job.write()
    if task.place(job.id) != task.link(job.id):  # found by its id all the same
        task.link(job.id).symlink_to(task.place(job.id))


def _announce(job: str, size: str, task: Task, ids: list[str]) -> None:
    lines = {
        "job": f"{job}, {size}",
        "run directory": _list(str(task.place(name)) for name in ids),
        "log": _list(str(task.folder / f"{name}.log") for name in ids),
        "follow": f"kexue logs {ids[0]} -f",
        "more": f"kexue status {job}, kexue cancel {job}",
    }
    for key, value in lines.items():
        print(f"{key:<14} {value}")


def _list(texts: Iterable[str]) -> str:
    """The first few of many."""
    texts = list(texts)
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
