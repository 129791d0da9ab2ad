"""The processes that Lightning starts for the other ranks of one machine, and what their end means for the run.

Lightning's own observer kills the main process with SIGKILL up to five seconds after another rank failed: whatever
that rank had to say, the exit code is that of a kill. Here the main process may end by itself first, the reason of the
rank that failed first is told, and the exit code is the one that belongs to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import ClusterEnvironment
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from ..errors import InputError
from ..signals import PREEMPTED, Preempted
from .ranks import inherited_run_dir, take_message

GRACE_SECONDS = 10.0  # for the main process to fail by itself after another rank did
NOTICE_SECONDS = 3.0  # for the others to say what is wrong after the main process failed
END_SECONDS = 120.0  # for the others to end after the main process is done
_WRONG_INPUT = 2


class WatchedLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks as Lightning does, and watches them itself."""

    def __init__(self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._ended = threading.Event()

    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other ranks if that has not been done, then call `function`."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=self._watch, daemon=True, name="kexue-rank-watch").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def failure(self, seconds: float = 0.0) -> Exception | None:
        """Why another rank failed, waiting for the end of all ranks at most this long; None when none did."""
        end = time.monotonic() + seconds
        while any(child.poll() is None for child in self.procs) and time.monotonic() < end:
            if self._failed():
                break
            time.sleep(0.05)
        return next((_reason(rank, child) for rank, child in self._failed()), None)

    def end(self) -> None:
        """Kill the ranks that still run: they wait for a main process that has gone, often inside a collective."""
        self._ended.set()
        for child in self.procs:
            if child.poll() is None:
                child.kill()
        for child in self.procs:
            child.wait()
            take_message(child.pid)

    def _failed(self) -> list[tuple[int, subprocess.Popen]]:
        good = (None, 0, PREEMPTED)
        return [(rank, child) for rank, child in enumerate(self.procs, start=1) if child.poll() not in good]

    def _watch(self) -> None:
        while not self._failed():
            if all(child.poll() is not None for child in self.procs):
                return
            time.sleep(0.2)
        if self._ended.wait(GRACE_SECONDS):
            return
        reason = self.failure()
        print(f"kexue: {reason}", file=sys.stderr, flush=True)
        self.end()
        os._exit(_WRONG_INPUT if isinstance(reason, InputError) else 1)


@contextlib.contextmanager
def supervised(trainer: pl.Trainer) -> Iterator[None]:
    """Within this context, the run ends as a whole: at the first failure of any rank, and no rank is left behind.

    Raises:
        InputError: another rank found the input wrong.
        RuntimeError: another rank failed otherwise; its own traceback is on stderr.
    """
    strategy: Any = trainer.strategy
    old = strategy.launcher
    if type(old) is not _SubprocessScriptLauncher or inherited_run_dir() is not None:
        yield
        return
    launcher = WatchedLauncher(old.cluster_environment, old.num_processes, old.num_nodes)
    strategy._launcher = launcher
    try:
        yield
    except Preempted:
        launcher.failure(NOTICE_SECONDS)  # the others leave too
        raise
    except InputError:
        raise
    except Exception as error:
        # When a rank dies the main one fails too, in the next collective: then the other has the reason.
        failure = launcher.failure(NOTICE_SECONDS)
        if isinstance(failure, InputError):
            raise failure from error
        if failure is not None:
            error.add_note(str(failure))
        raise
    else:
        failure = launcher.failure(END_SECONDS)
        if failure is not None:
            raise failure
    finally:
        launcher.end()


def _reason(rank: int, child: subprocess.Popen) -> Exception:
    if child.returncode == _WRONG_INPUT:
        return InputError(take_message(child.pid) or f"rank {rank} found the input wrong")
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        return RuntimeError(f"the process of rank {rank} was ended by {name} (out of memory?)")
    return RuntimeError(f"the process of rank {rank} failed with exit code {child.returncode}; its traceback is above")
