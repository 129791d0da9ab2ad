"""`log.txt` of a run: what kexue, Lightning and Python's warnings say, and the traceback of whatever ends it.

The file has everything; the terminal has what kexue says, and what of the rest a user can act upon.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..redaction import hide
from ..signals import Preempted
from .ranks import is_main_process

_LIBRARIES = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric")


class _Formatter(logging.Formatter):
    """Leaves secrets of the environment out: an error of a library may quote its request with the key in it."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


class _Terminal(logging.Handler):
    """Writes to whatever `sys.stderr` is now: a live progress bar puts its own stream there."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


@contextmanager
def log_to(folder: Path) -> Iterator[None]:
    """Within this context, write `folder/log.txt` and keep the terminal short; other ranks say nothing but errors."""
    main = is_main_process()
    file = logging.FileHandler(folder / "log.txt", encoding="utf-8", delay=True) if main else logging.NullHandler()
    file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = _Terminal()
    terminal.setFormatter(_Formatter())
    kexue, warned = logging.getLogger("kexue"), logging.getLogger("py.warnings")
    libraries = [logging.getLogger(name) for name in _LIBRARIES]
    # Lightning prints to the terminal by handlers of its own.
    streams = [(handler, handler.level) for library in libraries for handler in library.handlers]
    level, propagate, show = kexue.level, warned.propagate, warnings.showwarning

    def show_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
    ) -> None:
        warned.warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)
        if main and _concerns_user(category):
            print(f"warning: {message}", file=sys.stderr)

    kexue.setLevel(logging.INFO)
    if main:
        kexue.addHandler(terminal)
    for handler, _ in streams:
        handler.setLevel(logging.WARNING if main else logging.ERROR)
    for logger in (kexue, warned, *libraries):
        logger.addHandler(file)
    warned.propagate = False
    warnings.showwarning = show_warning
    try:
        yield
    except Preempted:
        raise
    except BaseException:
        file.handle(kexue.makeRecord("kexue", logging.ERROR, __file__, 0, "the run ended with:", (), sys.exc_info()))
        raise
    finally:
        warnings.showwarning = show
        warned.propagate = propagate
        for logger in (kexue, warned, *libraries):
            logger.removeHandler(file)
        for handler, before in streams:
            handler.setLevel(before)
        kexue.removeHandler(terminal)
        kexue.setLevel(level)
        file.close()


def _concerns_user(category: type[Warning]) -> bool:
    """Deprecations concern the authors of libraries; `PossibleUserWarning` is Lightning's word for a guess."""
    libraries = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    return not issubclass(category, libraries) and category.__name__ != "PossibleUserWarning"
