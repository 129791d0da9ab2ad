"""Requests to stop: the signals by which a scheduler announces the end of a job, kept until the run can answer them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
PREEMPTED = 75
"""Exit code of a run that was asked to stop and can be continued (EX_TEMPFAIL of sysexits.h)."""


class Preempted(SystemExit):
    """The run was asked to stop; what it has done so far is in its newest checkpoint.

    A SystemExit, so that a script that lets it pass ends with exit code 75 and without a traceback.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(PREEMPTED)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class StopRequest:
    """Handler that only takes a note, so that a signal at any moment, or many of them, disturb nothing.

    Attributes:
        received: Name of the first signal; None before it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take a note."""
        self.received = self.received or signal.Signals(number).name

    def install(self) -> None:
        """Handle the stop signals from now on; only the main thread can, in another one nothing is ever received."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self) for number in STOP_SIGNALS}

    def restore(self) -> None:
        """Bring back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}


def installed() -> StopRequest | None:
    """The handler that is in place, if any."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler if isinstance(handler, StopRequest) else None


def ignore_signals() -> None:
    """Let stop signals pass unnoticed, in a process that is ending because of one."""
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class SparedWorker:
    """What a loader's worker process begins with: the first stop signal of a kind is not for it.

    Schedulers send theirs to every process of a job. A worker that died of one would take the run with it, which is to
    save first and let its workers go then. The second of a kind ends the worker as ever: that is how a loader gets rid
    of one that hangs.

    Args:
        begin: What the worker did at its beginning before; None: nothing.
    """

    def __init__(self, begin: Callable[[int], None] | None) -> None:
        self.begin = begin

    def __call__(self, worker_id: int) -> None:
        """Prepare the process it runs in."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass)
        if self.begin is not None:
            self.begin(worker_id)

    @staticmethod
    def _pass(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)


def spare_workers(loader: Any) -> None:
    """Let worker processes of a torch DataLoader live through a first stop signal; other objects stay as they are."""
    if not getattr(loader, "num_workers", 0) or not hasattr(loader, "worker_init_fn"):
        return
    if not isinstance(loader.worker_init_fn, SparedWorker):
        loader.worker_init_fn = SparedWorker(loader.worker_init_fn)


@contextmanager
def caught() -> Iterator[None]:
    """Within this context, note stop signals instead of dying of them.

    After `Preempted` the handlers stay: the process is about to end, and a signal on the way would change its exit
    code.
    """
    request = StopRequest()
    request.install()
    try:
        yield
    except Preempted:
        raise
    except BaseException:
        request.restore()
        raise
    request.restore()
