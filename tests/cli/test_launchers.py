"""`kexue fit` started by torchrun and by the DeepSpeed launcher, on one machine and as if on two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

from kexue.cli.ranks import adopt_processes
from kexue.errors import InputError

BIN = Path(sys.executable).parent
FIT = ["debug=fast", "logger=csv", "trainer.accelerator=cpu", "trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes = ("SLURM_", "KEXUE_RUN", "LOCAL_", "CROSS_", "MASTER_")
    for name in [name for name in os.environ if name.startswith(prefixes) or "RANK" in name or name == "WORLD_SIZE"]:
        monkeypatch.delenv(name)


def run(*commands: list[str]) -> str:
    """What several commands print that run beside each other, all of which succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    try:
        printed = [process.communicate(timeout=800)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(printed)
    return "".join(printed)


def torchrun(nodes: int, node: int, port: int, *words: str) -> list[str]:
    options = [f"--nnodes={nodes}", f"--node-rank={node}", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    return [str(BIN / "torchrun"), *options, f"--master-port={port}", "--module", "kexue.cli", "fit", *FIT, *words]


@pytest.mark.slow
def test_torchrun_on_two_machines(tmp_path: Path) -> None:
    words = ["trainer.num_nodes=2", "strategy=zero_2", f"run_dir={tmp_path}/run"]
    port = free_port()
    printed = run(*(torchrun(2, node, port, *words) for node in range(2)))
    assert printed.count("everything lies in") == 1


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_deepspeeds_launcher(nodes: int, tmp_path: Path) -> None:
    """Two processes; it adds `--local_rank` to the words, and says nothing of the machine's number to Lightning."""
    hosts = [socket.gethostname(), "localhost"]
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in hosts))
    words = ["--module", "kexue.cli", "fit", *FIT, f"trainer.devices={2 // nodes}", f"trainer.num_nodes={nodes}"]
    together = (
        [f"--hostfile={tmp_path}/hosts", "--no_ssh", "--master_addr=127.0.0.1"] if nodes > 1 else ["--num_gpus=2"]
    )
    port, commands = free_port(), []
    for node in range(nodes):
        options = [*together, *([f"--node_rank={node}"] if nodes > 1 else []), f"--master_port={port}"]
        commands.append([str(BIN / "deepspeed"), *options, *words, "strategy=zero_1", f"run_dir={tmp_path}/run"])
    assert run(*commands).count("everything lies in") == 1


def test_numbers_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adopt_processes({"devices": 7, "num_nodes": 7})  # started by nobody: Lightning starts them
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"torchrun started 8 .*type trainer\.devices=4 trainer\.num_nodes=2"):
        adopt_processes({"devices": 8, "num_nodes": 1})
    for devices in (4, "4", [0, 1, 2, 3], "0,1,2,3", "auto", -1):
        adopt_processes({"devices": devices, "num_nodes": 2})


def test_slurms_words_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(InputError, match="type srun before kexue fit"):
        adopt_processes({"devices": 1, "num_nodes": 2})
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "3,1")
    with pytest.raises(InputError, match=r"4 processes as 3\+1 on 2 machines; .*--ntasks-per-node=2"):
        adopt_processes({"devices": 2, "num_nodes": 2})
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x3)")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    adopt_processes({"devices": 2, "num_nodes": 3})
    assert os.environ.pop("SLURM_NTASKS_PER_NODE") == "2"
    assert os.environ["SLURM_JOB_NAME"] == "kexue"
