"""Jobs without a cluster: what the batch script says, what is refused before anything is queued, and jobs here."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kexue.cli import main as cli
from kexue.cli.cluster import Cluster
from kexue.cli.job_logs import lines
from kexue.cli.jobs import Job, find
from kexue.cli.status import progress
from kexue.errors import InputError
from kexue.signals import SparedWorker, spare_workers

SLURM = ["submit", "cluster=slurm", "cluster.device=cpu"]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def script(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines of a batch script, which bash can read."""
    assert cli.main([*words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert list(Path().iterdir()) == [], "a dry run writes nothing"
    return text.splitlines()


def test_the_script_of_a_large_job(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8 cluster.time=24h cluster.partition=long "
        "cluster.account=lab cluster.qos=high cluster.constraint=a100 cluster.memory_per_task=16GiB "
        "cluster.modules=[cuda/12.4] cluster.srun=['--container-image=kexue.sqsh'] data.num_workers=3 strategy=zero_2"
    )
    text = script(
        capsys, "submit", *words.split(), "cluster.environment={NCCL_DEBUG: 'a b'}", "cluster.sbatch={exclusive: true}"
    )
    options = {line.removeprefix("#SBATCH --") for line in text if line.startswith("#SBATCH")}
    assert options == {
        *("nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=4", "mem=131072M", "time=1440"),
        *("partition=long", "account=lab", "qos=high", "constraint=a100", "exclusive", "requeue", "signal=USR1@90"),
        *("job-name=digits_multitask", "open-mode=append", f"output={Path.cwd()}/runs/digits_multitask/jobs/%j.log"),
    }
    assert {"module load cuda/12.4", "export NCCL_DEBUG='a b'"} <= set(text)
    (start,) = [line for line in text if line.startswith("srun ")]
    assert start.startswith("srun --kill-on-bad-exit=1 --cpus-per-task=4 --container-image=kexue.sqsh ")
    fit = f"{sys.executable} -m kexue.cli fit data.num_workers=3 strategy=zero_2 trainer.accelerator=gpu "
    assert f"{fit}trainer.devices=8 trainer.num_nodes=2 \"run_dir='$run_dir'\" &" in start
    assert f'run_dir={Path.cwd()}/runs/digits_multitask/"$job"' in text


def test_an_array_of_seeds_in_a_container(capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, *SLURM, "cluster.seeds=[7,8]", "cluster.container='apptainer exec image.sif'")
    assert {"#SBATCH --array=0-1", "seeds=(7 8)", 'job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'} <= set(text)
    (start,) = [line for line in text if line.startswith("srun ")]
    assert " apptainer exec image.sif kexue fit trainer.accelerator=cpu trainer.devices=1 " in start
    assert '"seed=${seeds[$SLURM_ARRAY_TASK_ID]}" &' in start
    assert "gpus" not in "\n".join(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "cluster=... is missing; type cluster=slurm or cluster=local"),
        ("cluster=slurmm", "cluster=slurmm: no such cluster; did you mean slurm?"),
        ("cluster=slurm cluster.node=2", "cluster.node: no such key; did you mean cluster.nodes?"),
        ("cluster=slurm cluster.device=tpu", "cluster.device='tpu': expected gpu or cpu"),
        ("cluster=slurm cluster.nodes=0", "cluster.nodes=0: use 1 or more"),
        ("cluster=slurm cluster.gpus_per_node=8 cluster.tasks_per_node=4", "there is one task per GPU"),
        ("cluster=slurm cluster.device=cpu cluster.gpus_per_node=2", "leave one of them out"),
        ("cluster=slurm cluster.gpus_per_node=8 trainer.devices=4", "trainer.devices=4, but the job has 8"),
        ("cluster=slurm cluster.gpus_per_node=8 trainer.devices=1", "leave trainer.devices out"),
        ("cluster=slurm cluster.nodes=2 trainer.num_nodes=4", "trainer.num_nodes=4, but the job has 2 (cluster.nodes)"),
        ("cluster=slurm trainer.accelerator=cpu", "trainer.accelerator=cpu, but the job has gpu (cluster.device)"),
        ("cluster=slurm cluster.nodes=2 strategy=single", "strategy=single is for one device, the job has 2"),
        ("cluster=slurm cluster.time=soon", "cluster.time=soon: not a time; write it like 24h"),
        ("cluster=slurm cluster.time=1m", "no longer than cluster.signal_seconds=90"),
        ("cluster=slurm cluster.memory_per_task=lots", "cluster.memory_per_task=lots: not a size"),
        ("cluster=slurm cluster.seeds=[1,1]", "give different seeds"),
        ("cluster=slurm cluster.seeds=[1,2] run_dir=here", "each seed has a run directory of its own"),
        ("cluster=slurm cluster.environment={WANDB_API_KEY:x}", "a secret would be written to config.yaml"),
        ("cluster=slurm cluster.sbatch={nodes:3}", "cluster.sbatch.nodes: kexue sets this itself"),
        ("cluster=slurm resume=gone.ckpt", "resume=gone.ckpt: no complete checkpoint there"),
        ("cluster=slurm trainer.max_epoch=3", "trainer.max_epoch: no such key; did you mean trainer.max_epochs?"),
        ("cluster=local cluster.seeds=[1,2]", "cluster.seeds: no such key"),
        ("cluster=local +cluster.nodes=2", "this is one machine; use cluster=slurm"),
    ],
)
def test_mismatches_are_refused_before_anything_is_queued(
    words: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("something was queued"))
    assert cli.main(["submit", *words.split()]) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.startswith("kexue: ")
    assert captured.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("time", "minutes"), [("24h", 1440), ("90m", 90), ("2d12h", 3600), ("1h30m", 90), (None, None), ("1d", 1440)]
)
def test_time_limits(time: str | None, minutes: int | None) -> None:
    assert Cluster("slurm", time=time).minutes() == minutes


def test_cluster_is_not_for_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "cluster=slurm"]) == 2
    assert "kexue fit runs it here" in capsys.readouterr().err


def test_without_slurm_or_submitit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(SLURM) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err
    assert not list(Path().glob("runs/*/jobs/*")), "nothing is left behind"
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert cli.main(SLURM) == 2
    assert "type pip install 'submitit" in capsys.readouterr().err


def test_unknown_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "cancel", "logs"):
        assert cli.main([command, "17"]) == 2
        assert "17: no job of that id below ./runs" in capsys.readouterr().err
    assert cli.main(["status"]) == 0
    assert "no jobs below ./runs" in capsys.readouterr().out


def test_jobs_are_found_by_id_array_and_folder(tmp_path: Path) -> None:
    for name in ("16_0", "16_1", "17"):
        Job("slurm", name, str(tmp_path / "runs/mine" / name), "log").write()
    assert [job.id for job in find(["16"])] == ["16_0", "16_1"]
    assert [job.id for job in find(["16_1"])] == ["16_1"]
    assert [job.id for job in find(["runs/mine/17"])] == [job.id for job in find(["run=17"])] == ["17"]
    assert [job.id for job in find([])] == ["16_0", "16_1", "17"]


def test_how_a_job_ended_is_known_when_the_scheduler_has_forgotten_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kexue.cli.jobs._call", lambda *command, absent: absent)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    job = Job("slurm", "17", str(tmp_path / "runs/mine/17"), "log")
    job.write()
    assert job.state()[0] == "GONE"
    for code, state in ((0, "COMPLETED"), (75, "PREEMPTED"), (2, "FAILED")):
        (tmp_path / "runs/mine/17/exit_code").write_text(f"{code}\n")
        assert job.state()[0] == state


def test_progress_is_read_from_the_run_directory(tmp_path: Path) -> None:
    assert progress(tmp_path) == []
    (tmp_path / "metrics.csv").write_text("step,train/loss\n9,1.0\n10,\n,\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step=00000009.ckpt").write_text("")
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("step=00000009.ckpt")
    assert progress(tmp_path) == ["step 10", "checkpoint step=00000009 (0 min ago)"]


def test_a_log_is_followed_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kexue.cli.job_logs.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("kexue.cli.job_logs.STATE_SECONDS", 0.01)
    log = tmp_path / "log"
    events = iter(["", "one\n", "two\n"])

    def ended() -> bool:
        text = next(events, None)
        with log.open("a") as file:
            file.write("the last words\n" if text is None else text)
        return text is None

    assert "".join(lines(log, ended)) == "one\ntwo\nthe last words\n"


SMALL = ["logger=csv", "trainer.enable_model_summary=false", "trainer.log_every_n_steps=1", "callbacks.progress=null"]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Job]]:
    """Submits jobs to this machine, and leaves none behind."""
    jobs: list[Job] = []

    def submit(*words: str) -> Job:
        jobs.append(submit_here(capsys, *words))
        return jobs[-1]

    yield submit
    for job in jobs:
        assert job.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def submit_here(capsys: pytest.CaptureFixture[str], *words: str) -> Job:
    assert cli.main(["submit", "cluster=local", "cluster.device=cpu", *SMALL, *words]) == 0
    printed = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if not line.startswith("run ")
    )
    (job,) = find([printed["job"].split(",")[0]])
    assert printed["follow"] == f"kexue logs {job.id} -f"
    return job


def wait(job: Job) -> str:
    end = time.monotonic() + 400
    while (state := job.state()[0]) == "RUNNING":
        assert time.monotonic() < end, Path(job.log).read_text()
        time.sleep(0.2)
    return state


@pytest.mark.slow
def test_a_job_here(here: Callable[..., Job], capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes in the background; the run directory is named by the job, and found by it."""
    job = here("debug=fast", "cluster.tasks_per_node=2", "cluster.setup=['echo ready']")
    assert job.state() == ("RUNNING", f"pid {job.pid}")
    assert wait(job) == "COMPLETED", Path(job.log).read_text()
    assert Path(job.run_dir).name == job.id
    assert "test/digit_accuracy" in json.loads((Path(job.run_dir) / "metrics.json").read_text())
    assert cli.main(["logs", job.id]) == cli.main(["status", job.id]) == cli.main(["cancel", job.id]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ready\n")
    assert "everything lies in" in printed
    assert f"{job.id} has ended already (COMPLETED)" in printed


def test_cancelling_a_job_here_saves_and_the_run_can_be_continued(here: Callable[..., Job]) -> None:
    job = here("trainer.max_epochs=100000", "run_dir=mine")
    assert Path(job.run_dir) == Path.cwd() / "mine"
    end = time.monotonic() + 300
    while not progress(Path("mine")):
        assert time.monotonic() < end, Path(job.log).read_text()
        time.sleep(0.2)
    assert cli.main(["cancel", "mine"]) == 0
    assert wait(find(["mine"])[0]) == "CANCELLED", Path(job.log).read_text()
    assert (Path("mine") / "exit_code").read_text() == "75\n"
    steps = [int(line.split(",")[0]) for line in (Path("mine") / "metrics.csv").read_text().splitlines()[1:]]
    saved = (Path("mine") / "checkpoints" / "last.ckpt").readlink().stem
    # Logged steps count from 0, saved ones from 1.
    assert saved == f"step={max(steps) + 1:08d}"


SLOWLY = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGUSR2)]


@pytest.mark.parametrize("number", [signal.SIGTERM, *SLOWLY], ids=lambda number: number.name)
def test_kexue_fit_ends_with_75_and_continues(number: int, tmp_path: Path) -> None:
    """A real process, signalled twice as soon as it trains; the same command then goes on behind its last step."""
    command = [sys.executable, "-m", "kexue.cli", "fit", *SMALL, "trainer.accelerator=cpu", f"run_dir={tmp_path}/run"]
    process = subprocess.Popen([*command, "trainer.max_epochs=100000"], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not progress(tmp_path / "run"):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert f"asked to stop ({signal.Signals(number).name}) at step" in errors
    assert "Traceback" not in errors + (tmp_path / "run" / "log.txt").read_text()
    saved = int((tmp_path / "run" / "checkpoints" / "last.ckpt").readlink().stem.partition("=")[2])
    assert subprocess.run([*command, f"trainer.max_steps={saved + 2}"], capture_output=True).returncode == 0
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = (
        rows[0].split(",").index("train/loss_step")
        if "train/loss_step" in rows[0]
        else rows[0].split(",").index("train/loss")
    )
    steps = [int(row.split(",")[0]) for row in rows[1:] if row.split(",")[0] and row.split(",")[column]]
    assert sorted(set(steps)) == list(range(saved + 2))


def test_a_signal_to_every_process_of_a_run_does_not_cost_it_its_workers(tmp_path: Path) -> None:
    """Schedulers signal workers of loaders too; torch lets those die of SIGTERM."""
    words = [*SMALL, "trainer.accelerator=cpu", "trainer.max_epochs=100000", "data.num_workers=2"]
    command = [sys.executable, "-m", "kexue.cli", "fit", *words, f"run_dir={tmp_path}/run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    end = time.monotonic() + 300
    while not progress(tmp_path / "run"):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "asked to stop (SIGTERM) at step" in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left


class Signalled(torch.utils.data.Dataset):
    """Two rows, at each of which a signal arrives."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        time.sleep(2.0 * index)  # the row before is on its way
        os.kill(os.getpid(), signal.SIGTERM)
        return int(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)


def test_the_second_signal_ends_a_worker_as_ever() -> None:
    begun: list[int] = []
    loader = torch.utils.data.DataLoader(Signalled(), batch_size=None, num_workers=1, worker_init_fn=begun.append)
    spare_workers(loader)
    spare_workers(loader)
    assert isinstance(loader.worker_init_fn, SparedWorker)
    assert loader.worker_init_fn.begin == begun.append
    iterator = iter(loader)
    assert next(iterator) == 1
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
        next(iterator)
    spare_workers(range(3))  # no loader of torch's


@pytest.mark.slow
def test_a_signal_before_the_run_begins_is_not_fatal(tmp_path: Path) -> None:
    """While torch loads for seconds, the signal is noted; it is answered before the first step."""
    command = [sys.executable, "-m", "kexue.cli", "fit", *SMALL, "trainer.accelerator=cpu", f"run_dir={tmp_path}/run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "at step 0" in errors
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_without_the_callback_signals_do_what_they_do_elsewhere(tmp_path: Path) -> None:
    words = [*SMALL, "callbacks.preemption=null", "trainer.max_epochs=100000", "trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "kexue.cli", "fit", *words, f"run_dir={tmp_path}/run"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not progress(tmp_path / "run"):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == -signal.SIGUSR1


def test_bad_input_of_a_job() -> None:
    with pytest.raises(InputError, match="cluster=local"):
        Cluster("local", nodes=2).check()
