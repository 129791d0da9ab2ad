"""W&B's process is ended by a signal, as on a cluster: no logged step is lost, and none comes twice."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kexue.callbacks import wandb_logger
from kexue.wandb_records import history, read_records, record_files

STEP = "trainer/global_step"


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def rows(folder: Path) -> list[dict]:
    return [row for file in record_files(folder) for row in history(read_records(file))]


def writers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]


def end_writer(sign: signal.Signals) -> None:
    for process in writers():
        process.send_signal(sign)
        process.wait(10)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_every_row_is_there_once_though_the_writer_dies(tmp_path: Path, sign: signal.Signals) -> None:
    logger = wandb_logger(tmp_path)
    logger.log_config({"model": {"dim": 3}})
    for step in range(40):
        logger.log_metrics({"train/loss": step / 10}, step)
        if step in (20, 30):
            end_writer(sign)
    logger.mark_preempting()
    logger.log_metrics({"late": 1.0}, 40)
    logger.mark_preempting()
    found = rows(tmp_path)
    assert [(row[STEP], row["train/loss"]) for row in found] == [(step, step / 10) for step in range(40)]
    assert len(record_files(tmp_path)) == 3
    last = list(read_records(record_files(tmp_path)[-1]))
    assert {"preempting", "exit", "alert"} <= {record["type"] for record in last}
    assert "model" in str([record for record in last if record["type"] in ("run", "config")])


def test_a_writer_that_cannot_stay_alive_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = wandb_logger(tmp_path)
    for step in range(60):
        logger.log_metrics({"train/loss": 1.0}, step)
        if step % 8 == 0:
            logger.log_metrics({"other": 1.0}, step + 1)  # so that the row before it has been sent
            end_writer(signal.SIGKILL)
    assert not logger.is_open
    assert "nothing more goes to W&B" in caplog.text


SCRIPT = """
import os, signal, sys, time
from kexue.callbacks import wandb_logger
logger = wandb_logger(sys.argv[1])
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
print("ready", logger.experiment.id, flush=True)
first, step = int(sys.argv[2]), int(sys.argv[2])
while not (told and step > first + 3):
    logger.log_metrics({"train/loss": float(step)}, step)
    step += 1
    time.sleep(0.02)
logger.finalize("finished")
print("steps", step, flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_though_the_writer_of_its_parent_lives(tmp_path: Path) -> None:
    """A child that shared its parent's writer would leave its id there, in use, when it is killed."""
    code = "from kexue.callbacks import wandb_logger; import sys; logger = wandb_logger(sys.argv[1])\n"
    code += "print(logger.experiment.id, flush=True); logger.log_metrics({'a': 1.0}, int(sys.argv[2]))\n"
    killed = code + "import os, time; logger.log_metrics({'a': 1.0}, 1); time.sleep(2); os.kill(os.getpid(), 9)"
    parent = wandb_logger(tmp_path / "parent")
    parent.log_metrics({"b": 1.0}, 0)
    assert parent.experiment.id
    assert "WANDB_SERVICE" in os.environ
    finished = code + "logger.finalize('finished')"
    for script, first, exit_code in ((killed, 0, -9), (finished, 2, 0)):
        command = [sys.executable, "-c", script, str(tmp_path / "child"), str(first)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == exit_code, done.stderr
    assert [row[STEP] for row in rows(tmp_path / "child")] == [0, 2]
    assert parent.is_open
    parent.finalize("finished")
    assert [row[STEP] for row in rows(tmp_path / "parent")] == [0]


@pytest.mark.slow
def test_sigterm_to_the_whole_job_and_a_requeue(tmp_path: Path) -> None:
    """As SLURM does it: every process of the step gets the signal, W&B's own among them; twice in a row."""
    ids, step = [], 0
    for _ in range(2):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(step)]
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert job.stdout is not None
        ids.append(job.stdout.readline().split()[1])
        processes = psutil.Process(job.pid)
        writer = processes.children(recursive=True)
        assert any("wandb-core" in process.name() for process in writer)
        time.sleep(0.4)
        for process in [*writer, processes]:
            process.send_signal(signal.SIGTERM)
        out, err = job.communicate(timeout=60)
        assert job.returncode == 0, err
        assert err == ""
        step = int(out.split()[-1])
    assert ids[0] == ids[1] == (tmp_path / "wandb" / "run_id").read_text()
    assert [row[STEP] for row in rows(tmp_path)] == list(range(step))
