"""Jobs on a real SLURM of two nodes: submitted, followed, cancelled; preempted, requeued, equal to uninterrupted."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm
import yaml

from kexue.cli import main as cli
from kexue.cli.jobs import Job, find
from kexue.cli.status import progress
from kexue.wandb_records import history, read_records, record_files

pytestmark = pytest.mark.cluster

# So that a step takes long enough to be hit by a signal.
SLOW = """
import time
import pytorch_lightning as pl

class Slow(pl.Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args) -> None:
        time.sleep(self.seconds)
"""
QUIET = [
    "logger=csv",
    "trainer.enable_model_summary=false",
    "trainer.log_every_n_steps=1",
    "callbacks.confusion_matrix=null",
]
NODES = ["cluster=slurm", "cluster.device=cpu", "cluster.nodes=2", "cluster.time=1h"]
STEPS = 45  # five epochs of nine steps of two processes


def slowly(seconds: float) -> list[str]:
    return ["+callbacks.slow._target_=slow.Slow", f"+callbacks.slow.seconds={seconds}"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """A cluster, and a folder to submit from."""
    reason = slurm.missing()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "slow.py").write_text(SLOW, encoding="utf-8")
    with slurm.cluster(nodes=2, cpus=4, gpus=2) as running, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for name, value in running.environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("KEXUE_ALLOW_TARGETS", "slow")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("WANDB_MODE", "offline")
        yield running


def submit(*words: str) -> list[Job]:
    """The jobs of a `kexue submit`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["submit", *QUIET, *words]) == 0
    name = printed.getvalue().splitlines()[0].split()[1].rstrip(",")
    return find([name])


def until(condition: Callable[[], object], what: str, job: Job, seconds: float = 240) -> None:
    try:
        slurm.wait_for(condition, what, seconds)
    except TimeoutError as error:
        log = Path(job.log)
        raise AssertionError(f"{error}; {job.state()}\n{log.read_text() if log.exists() else 'no log'}") from error


def ended(job: Job, state: str = "COMPLETED") -> None:
    until(lambda: job.state()[0] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), "the end", job)
    assert job.state()[0] == state, (job.state(), Path(job.log).read_text())


def step(job: Job) -> int:
    """The last logged step, -1 before the first."""
    found = [text for text in progress(Path(job.run_dir)) if text.startswith("step ")]
    return int(found[0].split()[1]) if found else -1


def losses(job: Job) -> dict[int, str]:
    """The training loss of every step, in all its digits; each step once."""
    with (Path(job.run_dir) / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    assert len({row["step"] for row in rows}) == len(rows), "a step that is there twice"
    return {int(row["step"]): row["train/loss"] for row in rows}


def validations(job: Job) -> list[tuple[str, str]]:
    with (Path(job.run_dir) / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [(row["step"], row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]


def recorded(job: Job) -> list[tuple[int, float]]:
    """Step and training loss of the rows that W&B has on disk, over all starts of the run; by whichever process."""
    rows = [row for file in record_files(Path(job.run_dir)) for row in history(read_records(file))]
    return [(row["trainer/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]


def usr1(cluster: slurm.Cluster, job: Job) -> None:
    """What comes before a time limit."""
    cluster.run("scancel", "--signal=USR1", job.id)


def urgent(cluster: slurm.Cluster, job: Job) -> None:
    """A job that needs all nodes and may take them: SIGTERM to the tasks."""
    cluster.run("sbatch", "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")


def interrupt(cluster: slurm.Cluster, job: Job, *events: Callable[[slurm.Cluster, Job], None]) -> None:
    """Interrupt a job again and again, each time some steps after it came back."""
    for number, event in enumerate(events, start=1):
        before = step(job)
        until(lambda before=before: step(job) >= before + 5, f"steps before interruption {number}", job)
        event(cluster, job)
        until(lambda number=number: cluster.field(job.id, "Restarts") == str(number), f"requeue {number}", job)
        until(lambda: cluster.state(job.id) == "PENDING", f"back in the queue {number}", job)
        cluster.start_now(job.id)
    ended(job)


@pytest.mark.parametrize("strategy", ["ddp", "zero_2"])
def test_requeued_equals_uninterrupted_bit_for_bit(strategy: str, cluster: slurm.Cluster, tmp_path: Path) -> None:
    """Two nodes; the signal of a time limit and an urgent job, each twice in a row; tasks see no SLURM command.

    Under DDP W&B records the interrupted run as well: one run, by one of the processes.
    """
    container = tmp_path / "container"
    container.write_text('#!/bin/sh\nexport PATH=/nowhere\nexec "$@"\n')
    container.chmod(0o755)
    words = [*NODES, f"strategy={strategy}", "trainer.max_epochs=5", "technique=[lookahead]"]
    (whole,) = submit(*words)
    ended(whole)
    inside = [f"cluster.container={container}", f"cluster.command='{sys.executable} -m kexue.cli'"]
    logger = ["logger=wandb"] if strategy == "ddp" else []
    (job,) = submit(*words, *inside, *logger, *slowly(0.1))
    interrupt(cluster, job, *((usr1, usr1, urgent) if strategy == "ddp" else (urgent, urgent)))
    assert list(losses(whole)) == list(range(STEPS))
    assert losses(job) == losses(whole)
    assert validations(job) == validations(whole)
    log = Path(job.log).read_text()
    events = 3 if strategy == "ddp" else 2
    assert log.count("goes back into the queue") == log.count("asked to stop (") == events
    tested = [json.loads((Path(run.run_dir) / "metrics.json").read_text())["test/loss"] for run in (whole, job)]
    assert tested[0] == tested[1]
    if strategy == "ddp":
        assert recorded(job) == [(number, float(loss)) for number, loss in losses(job).items()]
        run_id = (Path(job.run_dir) / "wandb" / "run_id").read_text()
        files = record_files(Path(job.run_dir))
        assert files == record_files(Path(job.run_dir), run_id)
        assert len(files) > events, "each start writes a file of its own"


def test_submit_follow_cancel(cluster: slurm.Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """One job from its first line to its cancellation, which saves and does not requeue."""
    (job,) = submit(*NODES, "trainer.max_epochs=1000", *slowly(0.05))
    assert Path(job.run_dir) == Path.cwd() / "runs" / "digits_multitask" / job.id
    follower = threading.Thread(target=cli.main, args=(["logs", job.id, "-f"],))
    follower.start()
    until(lambda: step(job) >= 3, "steps", job)
    capsys.readouterr()
    assert cli.main(["status", job.run_dir]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.split()[:4] == [job.id, "RUNNING", "on", "node[1-2],"]
    assert second.split()[0] == "step"
    assert cli.main(["cancel", job.id]) == 0
    until(lambda: cluster.state(job.id) == "CANCELLED", "the cancellation", job)
    follower.join(60)
    assert not follower.is_alive(), "the log ends with the job"
    until(cluster.idle, "free nodes", job)
    assert cluster.state(job.id) == "CANCELLED", "not back in the queue"
    saved = (Path(job.run_dir) / "checkpoints" / "last.ckpt").readlink().stem
    assert saved == f"step={step(job) + 1:08d}"
    capsys.readouterr()
    assert cli.main(["cancel", job.id]) == 0
    assert "has ended already (CANCELLED)" in capsys.readouterr().out


def test_an_array_of_seeds(cluster: slurm.Cluster) -> None:
    jobs = submit("cluster=slurm", "cluster.device=cpu", "cluster.seeds=[7,8]", "debug=fast")
    assert [job.id.partition("_")[2] for job in jobs] == ["0", "1"]
    for job, seed in zip(jobs, (7, 8), strict=True):
        ended(job)
        assert yaml.safe_load((Path(job.run_dir) / "config.yaml").read_text())["seed"] == seed
    assert losses(jobs[0]) != losses(jobs[1])


def test_a_sweep_is_one_array_and_goes_on(cluster: slurm.Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """Every point once; a second call runs none; one whose result is gone is the only one to run again."""
    place = Path("points").resolve()
    words = ["model.optimizer.lr=0.01,0.000001", "seed=1,2", "debug=fast", "trainer.limit_train_batches=9"]
    nodes = ["cluster=slurm", "cluster.device=cpu", "cluster.tasks_per_node=2", "cluster.time=1h"]

    def table() -> list[dict[str, str]]:
        with (place / "table.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def queued() -> list[str]:
        ids = cluster.run("squeue", "--noheader", "--array", "--states=all", "--format=%i").split()
        return sorted(name for name in ids if name.startswith(array))

    assert cli.main(["sweep", *QUIET, *words, f"sweep_dir={place}", *nodes, "parallel=2"]) == 0
    array = f"{capsys.readouterr().out.splitlines()[0].split()[1].rstrip(',')}_"
    jobs = find([array.rstrip("_")])
    assert [job.id for job in jobs] == queued() == [f"{array}{number}" for number in range(4)]
    assert [Path(job.run_dir) for job in jobs] == [place / f"{number:04d}" for number in range(4)]
    for job in jobs:
        ended(job)
    found = table()
    assert [row["state"] for row in found] == ["finished"] * 4
    scores = [float(row["val/digit_accuracy"]) for row in found]
    assert scores == sorted(scores, reverse=True)
    assert [float(row["model.optimizer.lr"]) for row in found] == [0.01, 0.01, 1e-6, 1e-6], "the best on top"
    for row in found:  # what stands in a row is what that point has trained with, and has reached
        folder = place / row["point"]
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (str(config["seed"]), config["trainer"]["devices"]) == (row["seed"], 2)
        assert config["model"]["optimizer"]["lr"] == float(row["model.optimizer.lr"])
        assert json.loads((folder / "metrics.json").read_text())["val/digit_accuracy"] == float(
            row["val/digit_accuracy"]
        )
    assert (place / "parallel_coordinates.png").read_bytes().startswith(b"\x89PNG")

    before = {path: path.stat().st_mtime_ns for path in place.glob("*/metrics.*")}
    everything = cluster.run("squeue", "--noheader", "--states=all", "--format=%i")
    assert cli.main(["sweep", f"run={place}", *nodes]) == 0
    assert "4 of 4 points finished" in capsys.readouterr().out
    assert cluster.run("squeue", "--noheader", "--states=all", "--format=%i") == everything, "nothing was queued"

    (place / "0002" / "metrics.json").unlink()
    assert cli.main(["sweep", f"run={place}", *nodes]) == 0
    array = f"{capsys.readouterr().out.splitlines()[0].split()[1].rstrip(',')}_"
    assert queued() == [f"{array}2"]
    ended(find([array.rstrip("_")])[0])
    assert table() == found
    after = {path: path.stat().st_mtime_ns for path in place.glob("*/metrics.*")}
    assert {path.parent.name for path in after if after[path] != before[path]} == {"0002"}


def test_a_signal_to_a_task_that_cannot_listen_yet(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """Before Python runs: the task dies of it, has lost nothing, and the job goes back into the queue."""
    container = tmp_path / "container"
    container.write_text('#!/bin/sh\nsleep 5\nexec "$@"\n')
    container.chmod(0o755)
    inside = [f"cluster.container={container}", f"cluster.command='{sys.executable} -m kexue.cli'"]
    (job,) = submit("cluster=slurm", "cluster.device=cpu", "debug=fast", *inside)
    until(lambda: cluster.state(job.id) == "RUNNING", "the start", job)
    time.sleep(1.5)
    usr1(cluster, job)
    until(lambda: cluster.field(job.id, "Restarts") == "1", "the requeue", job)
    cluster.run("scancel", job.id)


def test_a_wrong_input_fails_the_job_and_is_said_once(cluster: slurm.Cluster) -> None:
    """Two tasks are given a GPU each, which this host does not have."""
    (job,) = submit("cluster=slurm", "cluster.gpus_per_node=2", "debug=fast")
    ended(job, "FAILED")
    log = Path(job.log).read_text()
    assert "kexue: trainer: " in log
    assert "Traceback" not in log
    assert cluster.field(job.id, "Restarts") == "0"
    assert (Path(job.run_dir) / "exit_code").read_text() == "2\n"


def test_what_sbatch_refuses_is_one_line(cluster: slurm.Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "cluster=slurm", "cluster.device=cpu", "cluster.partition=nowhere"]) == 2
    assert capsys.readouterr().err.startswith("kexue: sbatch refused the job: ")
    assert not list(Path("runs/digits_multitask/jobs").glob(".*")), "nothing is left behind"


def srun(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(words), capture_output=True, text=True, timeout=240)


def test_fit_inside_srun(cluster: slurm.Cluster, tmp_path: Path) -> None:
    """In a shell's allocation, whose name would make Lightning think that each process is alone."""
    fit = [sys.executable, "-m", "kexue.cli", "fit", *QUIET, "debug=fast", "trainer.accelerator=cpu"]
    start = ["salloc", "--quiet", "--nodes=2", "srun", "--ntasks=2", "--ntasks-per-node=1"]
    done = srun(*start, *fit, "trainer.num_nodes=2", f"run_dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything lies in") == 1
    assert "step=00000003" in (tmp_path / "run" / "checkpoints" / "last.ckpt").readlink().name
    done = srun(*start, *fit, f"run_dir={tmp_path}/wrong")
    assert "srun started 2 processes on 2 machine(s)" in done.stderr
    assert "type trainer.devices=1 trainer.num_nodes=2" in done.stderr
    assert not (tmp_path / "wrong").exists()
    done = srun("sbatch", "--wait", "--ntasks=2", f"--output={tmp_path}/log", f"--wrap={' '.join(fit)}")
    assert "type srun before kexue fit" in (tmp_path / "log").read_text()
