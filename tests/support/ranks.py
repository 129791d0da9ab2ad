"""Run a plain function in several gloo processes, each with the environment of a launched rank."""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600, **kwargs: Any) -> list:
    """Call `function(*args, **kwargs)` in `world_size` new processes and return their results in the order of ranks.

    The function is found again by file and name, so it must stand at the top level of its file. Arguments and results
    are pickled. If one process fails, the others are ended and its output is raised as a RuntimeError.
    """
    with tempfile.TemporaryDirectory() as folder:
        call = Path(folder) / "call.pickle"
        call.write_bytes(pickle.dumps((function.__code__.co_filename, function.__name__, args, kwargs)))
        port = free_port()
        processes = []
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "KEXUE_RANK_CALL": str(call),
            }
            log = (Path(folder) / f"log.{rank}").open("w+")
            process = subprocess.Popen(
                [sys.executable, __file__, str(Path(folder) / f"result.{rank}")],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            processes.append((process, log))
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process, _ in processes):
                failed = [rank for rank, (process, _) in enumerate(processes) if process.poll() not in (None, 0)]
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            failed = [rank for rank, (process, _) in enumerate(processes) if process.poll() != 0]
            if failed:
                time.sleep(1.0)  # let the others print why they fail too
                texts = []
                for rank, (process, log) in enumerate(processes):
                    log.seek(0)
                    texts.append(f"--- rank {rank}, exit {process.poll()}\n{log.read()[-6000:]}")
                raise RuntimeError(f"{function.__name__} failed on ranks {failed}:\n" + "\n".join(texts))
        finally:
            for process, log in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                log.close()
        return [pickle.loads((Path(folder) / f"result.{rank}").read_bytes()) for rank in range(world_size)]


def _child(result: Path) -> None:
    file, name, args, kwargs = pickle.loads(Path(os.environ["KEXUE_RANK_CALL"]).read_bytes())
    spec = importlib.util.spec_from_file_location(f"rank_call_{Path(file).stem}", file)
    assert spec is not None
    assert spec.loader is not None
    sys.path.insert(0, str(Path(file).parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    value = getattr(module, name)(*args, **kwargs)
    result.write_bytes(pickle.dumps(value))
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
    sys.stdout.flush()
    # gloo's threads may abort the interpreter's own exit while another rank is still busy.
    os._exit(0)


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
