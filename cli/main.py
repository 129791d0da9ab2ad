"""Entry of the console script `kexue`: finds the subcommand and turns what it raises into an exit code.

A subcommand is a module of this package with a docstring (its help; the first line is shown by `kexue --help`) and
`run(args: list[str]) -> int`. It imports torch, Hydra and the rest inside `run`, so that help answers at once.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
import traceback
from types import ModuleType

from .. import __version__
from ..errors import InputError, ProcessDied
from ..redaction import hide
from ..signals import PREEMPTED, Preempted, ignore_signals
from .errors import explain, suggest
from .ranks import is_main_process, leave_message, rank

COMMANDS = (
    *("fit", "test", "predict", "export", "submit", "sweep", "status", "logs", "cancel", "dashboard"),
    *("list", "plan", "study"),
)
DONE, BUG, WRONG_INPUT, INTERRUPTED, NOBODY_READS = 0, 1, 2, 130, 141
_MODULES = {"logs": "job_logs"}  # `logs` is about the log of a run, for all commands


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: words after `kexue`; None takes those of this process.

    Returns:
        0 done, 2 the input is wrong (one line on stderr says what to type), 1 a bug (traceback) or another process of
        the run died (one line names it), 75 asked to stop by a signal and saved, 130 interrupted, 141 whoever read the
        output has left, as `head` does.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Preempted:
        ignore_signals()  # srun ends the others at the first exit, and Python's own handlers go before it does
        return PREEMPTED
    except SystemExit as stop:
        # Lightning answers Ctrl-C by leaving with 1, which would read as a bug.
        if isinstance(stop.__context__, KeyboardInterrupt):
            return INTERRUPTED
        raise
    except ProcessDied as died:
        if died.speaks:
            print(f"kexue: {hide('; '.join([str(died), *getattr(died, '__notes__', [])]))}", file=sys.stderr)
        return BUG
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return NOBODY_READS
        if "SLURM_STEP_ID" in os.environ:
            ignore_signals()  # srun ends this process once another has failed too: 143 would send the job back
        line = explain(error)
        if line is None:
            print(hide(traceback.format_exc()), end="", file=sys.stderr)
            return BUG
        if is_main_process():
            print(f"kexue: {hide(line)}", file=sys.stderr)
        elif not leave_message(line):
            print(f"kexue: rank {rank()}: {hide(line)}", file=sys.stderr)
        return WRONG_INPUT


def _dispatch(args: list[str]) -> int:
    # DeepSpeed's launcher puts this word in front; the environment says the same.
    args = [word for word in args if not word.startswith("--local_rank=")]
    command = args.pop(0) if args else "--help"
    if command in ("-h", "--help", "help"):
        print(_usage())
        return DONE
    if command == "--version":
        print(f"kexue {__version__}")
        return DONE
    if command not in COMMANDS:
        raise InputError(f"{command}: no such command; {suggest(command, COMMANDS)}")
    module = _load(command)
    if any(word in ("-h", "--help") for word in args):
        print((module.__doc__ or "").strip())
        return DONE
    return module.run(args)


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more; what is still to be written goes nowhere then."""
    poll = select.poll()
    poll.register(1, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def _load(command: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES.get(command, command)}", __package__)


def _usage() -> str:
    lines = [f"  {name:<9} {(_load(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: kexue COMMAND [KEY=VALUE ...]",
            "",
            *lines,
            "",
            "kexue COMMAND --help says more; kexue --version prints the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
