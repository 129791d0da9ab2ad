"""A private SLURM of several nodes on this one host, for as long as a `with` block: real daemons on loopback.

Needs root and Debian's slurm-wlm and munge. Nothing of the host is used or changed but /etc/hosts, where the names of
the nodes stand until the end: Lightning looks up the name of the first node. Run it as a program for a shell to try
things in: `python tests/support/slurm.py` starts one, prints what to source, and stops it at Enter.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
HOSTS = Path("/etc/hosts")

# Followed by parent process instead of cgroups; nodes that offer more than the host has; decisions within a second.
# A job in "urgent" preempts those in "main": SIGCONT and SIGTERM, and after GraceTime SLURM itself requeues the job.
CONFIG = """\
ClusterName=kexue
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
MinJobAge=900
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "SLURM's daemons need root here"


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Look until `condition()` is true.

    Raises:
        TimeoutError: it did not become true; `what` says what was waited for.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


class Cluster:
    """What a test does with a running cluster.

    Attributes:
        folder: its files, among them the daemons' logs.
        environment: variables that SLURM's commands need.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run one of SLURM's commands and return what it prints."""
        environment = {**os.environ, **self.environment}
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=environment).stdout

    def state(self, job: str) -> str:
        """State of a job or array task, such as RUNNING; GONE when the cluster has forgotten it."""
        try:
            return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip() or "GONE"
        except subprocess.CalledProcessError:
            return "GONE"

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as Restarts."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return next(word.partition("=")[2] for word in text.split() if word.startswith(f"{name}="))

    def start_now(self, job: str) -> None:
        """Start a requeued job soon; SLURM itself holds it back for two minutes."""
        wait_for(self.idle, "nodes that the job has left")
        time.sleep(2)  # credentials of before and after are told apart by the second: 'Job credential revoked'
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def idle(self) -> bool:
        """Whether every node is free."""
        return set(self.run("sinfo", "--noheader", "--partition=main", "--format=%T").split()) == {"idle"}

    def clear(self) -> None:
        """Cancel all jobs and wait until the nodes are free."""
        self.run("scancel", "--user=root")
        wait_for(self.idle, "free nodes")


@contextlib.contextmanager
def cluster(nodes: int = 2, cpus: int = 4, gpus: int = 0) -> Iterator[Cluster]:
    """Start a cluster, and stop it at the end.

    Args:
        nodes: how many, named node1, node2, ...
        cpus: of each node; may be more than the host has.
        gpus: of each node, pretended: jobs may ask for them, and see CUDA_VISIBLE_DEVICES with nothing behind.
    """
    folder = Path(tempfile.mkdtemp(prefix="kexue-slurm-"))
    folder.chmod(0o755)
    names = [f"node{number}" for number in range(1, nodes + 1)]
    host = socket.gethostname().partition(".")[0]
    mark = f"# {folder}"
    _configure(folder, host, names, cpus, gpus)
    started: list[str] = []
    environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "SLURM_CONF": str(folder / "slurm.conf")}

    def start(name: str, *command: str) -> None:
        with (folder / "start.log").open("a") as log:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        started.append(name)

    try:
        with HOSTS.open("a", encoding="utf-8") as hosts:
            hosts.writelines(f"127.0.0.1 {name} {mark}\n" for name in [host, *names])
        paths = [f"--key-file={folder}/munge.key", f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid"]
        start("munged", "munged", "--force", *paths, f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed")
        start("slurmctld", "slurmctld")
        for name in names:
            start(f"slurmd-{name}", "slurmd", "-N", name)
        running = Cluster(folder)
        wait_for(running.idle, "idle nodes", 30)
        yield running
        running.clear()
    finally:
        for name in reversed(started):
            _stop(folder / f"{name}.pid")
        lines = HOSTS.read_text(encoding="utf-8").splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if not line.rstrip().endswith(mark)), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)


def _configure(folder: Path, host: str, names: list[str], cpus: int, gpus: int) -> None:
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    ports = _free_ports(len(names) + 1)
    offer = f"CPUs={cpus} RealMemory=16000 State=UNKNOWN" + (f" Gres=gpu:{gpus}" if gpus else "")
    nodes = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {offer}"
        for name, port in zip(names, ports[1:], strict=True)
    ]
    text = CONFIG.format(host=host, port=ports[0], folder=folder, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    devices = [folder / f"gpu{number}" for number in range(gpus)]
    for device in devices:  # SLURM wants device files; these are further names of /dev/null
        os.mknod(device, 0o20666, os.makedev(1, 3))
    lines = [f"NodeName={name} Name=gpu File={device}\n" for name in names for device in devices]
    (folder / "gres.conf").write_text("".join(lines), encoding="utf-8")
    for name in ["state", *(f"spool-{name}" for name in names)]:
        (folder / name).mkdir()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _stop(file: Path) -> None:
    """End the daemon of a pid file: politely, then by force."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        pid = int(file.read_text())
        os.kill(pid, signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.1)
            os.kill(pid, 0)
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    with cluster(gpus=2) as shell:
        print(f"export SLURM_CONF={shell.folder}/slurm.conf", flush=True)
        input("Enter stops it. ")
