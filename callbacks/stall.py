"""End a run in which a process has died or hangs, and say which one, where and since when.

A collective waits for every process, and a process that waits cannot tell for whom. So a thread beside each process
writes down how far that one is, in a file that all can read, and reads those of the others once its own stands still.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytorch_lightning as pl
import torch.distributed

from ..errors import InputError, ProcessDied

EXIT_CODE = 1
TURN_SECONDS = 3.0
"""How long a process waits for one of a lower rank to speak, for each rank in between, at most a few times."""
ENDING_SECONDS = 3.0
"""How long a process that was killed may take to be gone, after its connections are closed."""
SPOKEN = "stalled"


@dataclass
class Sign:
    """What a process tells of itself.

    Attributes:
        beats: Batches and phases it has passed since the start; all processes pass the same ones.
        phase: What it is doing.
        step: Its optimiser step.
        place: Where in the code its main thread is, once it stands still.
        host: Its machine.
        pid: Its number there, with the moment at which it was started and the namespace that numbers are of.
        at: When it was written, by its machine's clock.
        turns: Grows with every time it is written: a process whose number stands still is gone.
    """

    beats: int = 0
    phase: str = "starting"
    step: int = 0
    place: str = ""
    host: str = ""
    pid: tuple[int, float, str] | None = None
    at: float = 0.0
    turns: int = 0

    @classmethod
    def own(cls) -> Sign:
        """Of this process, before it has done anything."""
        return cls(host=socket.gethostname(), pid=(os.getpid(), psutil.Process().create_time(), _namespace()))

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None where that cannot be seen from here."""
        if self.pid is None or self.host != socket.gethostname() or self.pid[2] != _namespace():
            return None
        try:
            process = psutil.Process(self.pid[0])
            another = abs(process.create_time() - self.pid[1]) > 2.0  # seconds: clocks are set
            return another or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


class StopWhenStalled(pl.Callback):
    """End every process, each with exit code 1, when the run stands still; one of them says why in one line.

    - A process whose sign of life stops for `dead_after` seconds, while this one makes no progress either, has died or
      is frozen: it is named with its machine and the step at which it was last seen.
    - Where all are alive and none makes progress for `timeout` seconds, those are named that are behind the others:
      these wait for them in a collective. The stack of every thread of every process is in `folder/stack-RANK.txt`.
    - A process that dies lets the collectives of the others fail at once, with an error of the network. That error gets
      a note with the rank that died and the step; `died` holds it.

    A step costs an addition. What takes longer than `timeout` without a batch passing (compiling, reading a large file,
    scoring on one process) needs a larger one.

    Args:
        folder: Where the signs lie, on a file system that all processes share.
        timeout: Seconds without a batch after which the run is given up.
        dead_after: Seconds after which a process without a sign of life counts as dead.

    Attributes:
        died: Why this process failed, where the reason is that another one has died.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(self, folder: str | Path, timeout: float = 1800.0, dead_after: float = 30.0) -> None:
        if timeout <= 0 or dead_after <= 0:
            raise InputError(f"StopWhenStalled(timeout={timeout}, dead_after={dead_after}): use seconds above 0.")
        self.folder = Path(folder)
        self.timeout = timeout
        self.dead_after = dead_after
        self.died: ProcessDied | None = None
        self._own = Sign()
        self._watch: _Watch | None = None
        self._thread: threading.Thread | None = None

    # Progress

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start watching once the processes know each other."""
        if self._thread is None:
            self._own = Sign.own()
            self._watch = _Watch(self, trainer.global_rank, trainer.world_size, threading.Event())
            self._thread = threading.Thread(target=self._watch.run, daemon=True, name="kexue-stall-watch")
            self._thread.start()
        self._pass(trainer, f"setting up {stage}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching: the processes part."""
        self._end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching: this process has something better to say, unless another one's death is the reason."""
        if self._watch is not None and isinstance(exception, Exception) and not isinstance(exception, InputError):
            self.died = self._watch.reason_of(exception)
            if self.died is not None:
                exception.add_note(str(self.died))
        self._end()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A batch has been read."""
        self._pass(trainer, "training")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """A batch is done; what follows may be its checkpoint or the reading of the next one."""
        self._pass(trainer, "between training batches")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A batch has been read."""
        self._pass(trainer, "validating")

    def on_test_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A batch has been read."""
        self._pass(trainer, "testing")

    def on_predict_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """A batch has been read."""
        self._pass(trainer, "predicting")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validation is done."""
        self._pass(trainer, "after validation")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: object) -> None:
        """A checkpoint is about to be written."""
        self._pass(trainer, "saving a checkpoint")

    def _pass(self, trainer: pl.Trainer, phase: str) -> None:
        own = self._own
        own.beats += 1
        own.phase = phase
        own.step = trainer.global_step

    def _end(self) -> None:
        if self._watch is not None and self._thread is not None:
            self._watch.stop.set()
            self._thread.join(TURN_SECONDS)
            self._watch = self._thread = None


class _Watch:
    """The thread beside one process."""

    def __init__(self, callback: StopWhenStalled, rank: int, world_size: int, stop: threading.Event) -> None:
        self.folder, self.timeout, self.dead_after = callback.folder, callback.timeout, callback.dead_after
        self.own, self.rank, self.world_size, self.stop = callback._own, rank, world_size, stop
        self.interval = min(5.0, self.timeout / 4, self.dead_after / 4)
        self.seen: dict[int, tuple[int, float]] = {}
        # Signs are written once all processes know each other: what is older was left by a run that was here before.
        self.born = self.own.pid[1] if self.own.pid else 0.0

    def run(self) -> None:
        """Write, and look at the others while there is no progress."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            (self.folder / SPOKEN).unlink(missing_ok=True)  # of a run that was given up and goes on now
        beats, since = -1, time.monotonic()
        while True:
            self._write()
            if self.own.beats != beats:
                beats, since = self.own.beats, time.monotonic()
                self.seen = {}  # while there is progress, all are alive
            idle = time.monotonic() - since
            self.own.place = _place_of_main_thread() if idle else ""
            if idle > self.dead_after / 2 and self.world_size > 1:
                signs = self._read()
                if dead := self._dead(signs):
                    self._give_up(self._about_dead(dead, signs))
                    return
            if idle > self.timeout:
                self._give_up(self._about_stall(self._read()))
                return
            if self.stop.wait(self.interval):
                self._leave()
                return

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            self._path(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # the last one does it

    def _path(self, rank: int) -> Path:
        return self.folder / f"sign-{rank}.json"

    def _write(self) -> None:
        self.own.turns += 1
        self.own.at = time.time()
        path = self._path(self.rank)
        partial = path.with_suffix(".partial")
        with contextlib.suppress(OSError):  # a full disk is for whoever writes something that matters to report
            partial.write_text(json.dumps(asdict(self.own)), encoding="utf-8")
            partial.replace(path)

    def _read(self) -> dict[int, Sign]:
        signs = {}
        for rank in range(self.world_size):
            try:
                sign = Sign(**json.loads(self._path(rank).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue  # not there yet, or no longer: that process has ended by itself and says why
            if sign.at >= self.born:
                signs[rank] = sign
        return signs

    def _dead(self, signs: Mapping[int, Sign]) -> list[int]:
        """Ranks whose number has not grown for too long by this process' own clock."""
        now, dead = time.monotonic(), []
        for rank, sign in signs.items():
            turns, since = self.seen.get(rank, (-1, now))
            if turns != sign.turns:
                self.seen[rank] = (sign.turns, now)
            elif rank != self.rank and now - since > self.dead_after:
                dead.append(rank)
        return dead

    def reason_of(self, error: Exception) -> ProcessDied | None:
        """Who has died, if that is why this process fails; it keeps on giving signs while it looks.

        Whoever ends by itself takes its sign away. One that was killed leaves it; on another machine that shows by its
        standing still, which is waited for only where the error is one of the network.
        """
        spoken = self.folder / SPOKEN
        with contextlib.suppress(OSError):
            if spoken.stat().st_mtime >= self.born:  # another one has given up, and said why
                return ProcessDied(spoken.read_text(encoding="utf-8"), speaks=False)
        before = self._read()
        dead = {rank for rank, sign in before.items() if sign.is_gone()}
        end = time.monotonic() + ENDING_SECONDS
        while not dead and _is_of_network(error) and self._has_neighbours(before) and time.monotonic() < end:
            self.stop.wait(0.05)
            before = self._read()
            dead = {rank for rank, sign in before.items() if sign.is_gone()}
        if not dead and _is_of_network(error) and any(sign.is_gone() is None for sign in before.values()):
            self.stop.wait(1.6 * self.interval)
            for rank, sign in self._read().items():
                if rank in before and sign.is_gone() is None and sign.turns == before[rank].turns:
                    dead.add(rank)
        if not dead:
            return None
        named = " and ".join(f"rank {rank} on {before[rank].host}" for rank in sorted(dead))
        speaks = self.rank == min(set(range(self.world_size)) - dead)
        return ProcessDied(f"{named} died at step {self.own.step}, {self.own.phase}", speaks)

    def _has_neighbours(self, signs: Mapping[int, Sign]) -> bool:
        """Whether there is another process on this machine: it would be seen to end."""
        return any(rank != self.rank and sign.is_gone() is False for rank, sign in signs.items())

    def _about_dead(self, dead: list[int], signs: Mapping[int, Sign]) -> str:
        named = "; ".join(f"rank {r} on {signs[r].host}, last seen at step {signs[r].step}" for r in dead)
        return f"no sign of life for {self.dead_after:g} s from {named}: that process has died or its machine hangs"

    def _about_stall(self, signs: Mapping[int, Sign]) -> str:
        """Name the ranks that are behind, or all where they are equally far."""
        first = max(sign.beats for sign in signs.values())
        behind = {rank: sign for rank, sign in signs.items() if sign.beats < first} or dict(signs)
        named = "; ".join(f"rank {r} on {s.host} at step {s.step}, {s.phase}{s.place}" for r, s in behind.items())
        rest = [str(rank) for rank in signs if rank not in behind]
        waiting = f", and {'rank' if len(rest) == 1 else 'ranks'} {', '.join(rest)} waiting for it" if rest else ""
        return (
            f"no progress for {self.timeout:g} s: {named}{waiting}; the stacks are in {self.folder}/stack-RANK.txt; "
            "if it was only slow, set a larger timeout of StopWhenStalled (callbacks.stall.timeout)"
        )

    def _give_up(self, reason: str) -> None:
        with contextlib.suppress(OSError), self._stack().open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file)
        # The lowest rank that is able to speaks; the others leave it the time, and are silent if it has spoken.
        if self.stop.wait(min(self.rank, 4) * TURN_SECONDS):
            self._leave()
            return
        try:
            with (self.folder / SPOKEN).open("x", encoding="utf-8") as file:
                file.write(reason)
            print(f"kexue: {reason}", file=sys.stderr, flush=True)
        except FileExistsError:
            pass
        except OSError:
            print(f"kexue: {reason}", file=sys.stderr, flush=True)
        if children := psutil.Process().children(recursive=True):
            # Those that can, end by themselves, and write their stacks before.
            psutil.wait_procs(children, timeout=self.interval + TURN_SECONDS)
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        os._exit(EXIT_CODE)

    def _stack(self) -> Path:
        return self.folder / f"stack-{self.rank}.txt"


def _is_of_network(error: Exception) -> bool:
    """Whether an error is what gloo, NCCL or torch's store say when they lose another process."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("onnection", "roken pipe", "NCCL"))


def _place_of_main_thread() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return f", in {frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})" if frame else ""
