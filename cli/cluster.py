"""What a job asks of a cluster, worked out from one config and checked before anything is queued."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import InputError

_LIMIT = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])(i?)B", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OF_KEXUE = ("array", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "mem", "time", "output", "error", "signal")

_DECIDED_BY = {
    "accelerator": "cluster.device",
    "devices": "one per task, cluster.gpus_per_node or cluster.tasks_per_node",
    "num_nodes": "cluster.nodes",
}


@dataclass(frozen=True)
class Cluster:
    """The `cluster` section of a config; conf/cluster/slurm.yaml says what each key means."""

    scheduler: Literal["slurm", "local"]
    device: Literal["gpu", "cpu"] = "gpu"
    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    memory_per_task: str | None = None
    time: str | int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    seeds: list[int] | None = None
    modules: list[str] = field(default_factory=list)
    environment: dict[str, Any] | None = None
    setup: list[str] = field(default_factory=list)
    container: str | None = None
    command: str | None = None
    srun: list[str] = field(default_factory=list)
    sbatch: dict[str, Any] | None = None
    signal_seconds: int = 90

    @property
    def tasks(self) -> int:
        """Tasks on each node: one per device."""
        return self.tasks_per_node or self.gpus or 1

    @property
    def gpus(self) -> int:
        """GPUs on each node."""
        return 0 if self.device == "cpu" else self.gpus_per_node or self.tasks_per_node or 1

    def check(self) -> None:
        """Check the keys against each other.

        Raises:
            InputError: one line with the key and what to type.
        """
        for name in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "signal_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"cluster.{name}={value}: use 1 or more")
        if self.scheduler == "local" and self.nodes > 1:
            raise InputError(f"cluster=local cluster.nodes={self.nodes}: this is one machine; use cluster=slurm")
        if self.scheduler == "local" and self.seeds:
            raise InputError("cluster=local cluster.seeds: runs one at a time here; type seed=N, or use cluster=slurm")
        if self.device == "cpu" and self.gpus_per_node:
            raise InputError(
                f"cluster.device=cpu cluster.gpus_per_node={self.gpus_per_node}: leave one of them out; "
                "on CPUs say cluster.tasks_per_node=N"
            )
        if self.device == "gpu" and self.tasks != self.gpus:
            raise InputError(
                f"cluster.tasks_per_node={self.tasks} cluster.gpus_per_node={self.gpus}: there is one task per GPU; "
                "leave cluster.tasks_per_node out"
            )
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            raise InputError(f"cluster.seeds={self.seeds}: give different seeds, such as cluster.seeds=[1,2,3]")
        for name in self.environment or {}:
            if not _NAME.fullmatch(name):
                raise InputError(f"cluster.environment: {name} is not a name of a variable")
        for name in self.sbatch or {}:
            if name.replace("_", "-") in _OF_KEXUE:
                raise InputError(f"cluster.sbatch.{name}: kexue sets this itself; see the keys of cluster")
        self.minutes()
        self.memory()

    def minutes(self) -> int | None:
        """The time limit.

        Raises:
            InputError: not a time.
        """
        if self.time is None:
            return None
        found = _LIMIT.fullmatch(str(self.time).replace(" ", ""))
        days, hours, minutes = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
        total = (days * 24 + hours) * 60 + minutes
        if not total:
            raise InputError(f"cluster.time={self.time}: not a time; write it like 24h, 90m or 2d12h")
        if total * 60 <= self.signal_seconds:
            raise InputError(
                f"cluster.time={self.time}: no longer than cluster.signal_seconds={self.signal_seconds}, in which the "
                "run is to save; give more time or fewer seconds"
            )
        return total

    def memory(self) -> int | None:
        """Megabytes (of 1024 KiB, as SLURM counts) on each node.

        Raises:
            InputError: not a size.
        """
        if self.memory_per_task is None:
            return None
        found = _SIZE.fullmatch(self.memory_per_task.strip())
        if found is None or not float(found[1]):
            raise InputError(f"cluster.memory_per_task={self.memory_per_task}: not a size; write it like 16GB or 24GiB")
        size = float(found[1]) * (1024 if found[3] else 1000) ** (2 + "MGT".index(found[2].upper()))
        return -(-int(size * self.tasks) // 2**20)

    def cpus(self, config: Mapping[str, Any]) -> int:
        """CPUs of each task."""
        workers = config["data"].get("num_workers", 0)
        return self.cpus_per_task or 1 + (workers if isinstance(workers, int) else 0)


def trainer_words(cluster: Cluster, config: Mapping[str, Any], words: list[str]) -> list[str]:
    """The words of `kexue fit` that make its trainer fit the job.

    Args:
        cluster: checked.
        config: plain and valid.
        words: as typed.

    Raises:
        InputError: the config asks for another number of devices or machines, or for one device only.
    """
    decided = {
        "accelerator": cluster.device,
        "devices": cluster.tasks,
        "num_nodes": cluster.nodes,
    }
    typed = {word.partition("=")[0].lstrip("+~") for word in words}
    for key, value in decided.items():
        given, undecided = config["trainer"][key], {"auto"} if key == "accelerator" else {1, "auto", -1}
        if given != value and (given not in undecided or f"trainer.{key}" in typed):
            raise InputError(
                f"trainer.{key}={given}, but the job has {value} ({_DECIDED_BY[key]}); leave trainer.{key} out"
            )
    world = cluster.tasks * cluster.nodes
    if world > 1 and str(config["strategy"]["_target_"]).endswith("SingleDevice"):
        raise InputError(f"strategy=single is for one device, the job has {world}; use strategy=ddp or strategy=zero_2")
    return [f"trainer.{key}={value}" for key, value in decided.items()]
