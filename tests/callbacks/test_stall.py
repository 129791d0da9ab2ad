"""Who is named when a run stands still, by signs written by hand and by real processes that hang, freeze or die."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from kexue.callbacks import StopWhenStalled
from kexue.callbacks import stall as implementation
from kexue.callbacks.stall import Sign
from kexue.errors import InputError

HANG = """
import os, signal, time
import pytorch_lightning as pl

class Hang(pl.Callback):
    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            if self.how == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(3600)

class Die(pl.Callback):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == self.rank:
            with open("died", "w") as file:
                file.write(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
"""


def watch(folder: Path, rank: int = 0, world_size: int = 3, **options: Any) -> Any:
    callback = StopWhenStalled(folder, **options)
    return implementation._Watch(callback, rank, world_size, threading.Event())


def write(folder: Path, rank: int, **fields: Any) -> None:
    sign = {"host": f"node{rank}", "phase": "training", "beats": 10, "step": 5, "turns": 1} | fields
    (folder / f"sign-{rank}.json").write_text(json.dumps(asdict(Sign(**sign))))


def test_the_ranks_that_are_behind_are_named(tmp_path: Path) -> None:
    for rank, fields in enumerate(({"beats": 11}, {"beats": 10}, {"beats": 11})):
        write(tmp_path, rank, **fields)
    own = watch(tmp_path, timeout=60)
    text = own._about_stall(own._read())
    assert text.startswith("no progress for 60 s: rank 1 on node1 at step 5, training, and ranks 0, 2 waiting for it")
    assert "\n" not in text
    write(tmp_path, 1, beats=11)
    text = own._about_stall(own._read())
    assert all(f"rank {rank} on node{rank}" in text for rank in range(3))
    assert "waiting" not in text


def test_a_process_whose_sign_stands_still_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(implementation.time, "monotonic", lambda: now[0])
    own = watch(tmp_path, dead_after=30)
    for turn in range(9):
        now[0] += 5
        write(tmp_path, 0, turns=1)  # its own is not looked at
        write(tmp_path, 1, turns=turn)
        write(tmp_path, 2, turns=1)
        dead = own._dead(own._read())
        assert dead == ([2] if turn > 6 else [])
    assert "rank 2 on node2, last seen at step 5" in own._about_dead(dead, own._read())
    (tmp_path / "sign-2.json").write_text("{")  # half a file, or one that is gone: it has ended by itself
    assert own._dead(own._read()) == []


def test_signs_are_written_and_removed(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    callback = StopWhenStalled(folder, timeout=0.4)
    trainer: Any = type("Trainer", (), {"global_rank": 0, "world_size": 1, "global_step": 7})()
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    for _ in range(20):  # half a second, longer than the timeout, but in progress
        callback.on_train_batch_start(trainer)
        time.sleep(0.05)
    sign = json.loads((folder / "sign-0.json").read_text())
    assert (sign["step"], sign["phase"]) == (7, "training")
    assert sign["turns"] > 3
    callback.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    assert not folder.exists()


LOST = RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1234")


@pytest.fixture
def ended() -> Any:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    number = (process.pid, psutil.Process(process.pid).create_time(), implementation._namespace())
    process.wait()
    return number


def test_who_died_is_seen_at_once_on_the_same_machine(tmp_path: Path, ended: Any) -> None:
    here = asdict(Sign.own()) | {"beats": 10}
    write(tmp_path, 0, **here)
    write(tmp_path, 1, **here)
    write(tmp_path, 2, **here | {"pid": ended})
    own = watch(tmp_path, rank=1)
    own.own.step, own.own.phase = 6, "training"
    died = own.reason_of(LOST)
    assert str(died) == f"rank 2 on {here['host']} died at step 6, training"
    assert not died.speaks, "rank 0 does"
    write(tmp_path, 0, **here | {"pid": ended})
    died = own.reason_of(LOST)
    assert str(died).startswith(f"rank 0 on {here['host']} and rank 2 on {here['host']} died")
    assert died.speaks
    own.born = time.time()
    assert own.reason_of(LOST) is None, "signs of a run that was here before"
    own.born = 0.0
    for rank in (0, 2):
        (tmp_path / f"sign-{rank}.json").unlink()  # they have failed by themselves
    assert own.reason_of(LOST) is None


def test_a_process_that_was_killed_may_take_a_while_to_be_gone(tmp_path: Path) -> None:
    """Its connections are closed before; until it is waited for it is there."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    number = (process.pid, psutil.Process(process.pid).create_time(), implementation._namespace())
    here = asdict(Sign.own())
    write(tmp_path, 0, **here | {"pid": number})
    write(tmp_path, 1, **here)
    ending = threading.Timer(0.5, process.kill)
    ending.start()
    assert str(watch(tmp_path, rank=1).reason_of(LOST)).startswith(f"rank 0 on {here['host']} died")
    ending.join()
    process.wait()


def test_who_died_on_another_machine_gives_no_signs(tmp_path: Path) -> None:
    write(tmp_path, 0, **asdict(Sign.own()))
    write(tmp_path, 1)
    write(tmp_path, 2)
    own = watch(tmp_path, dead_after=2)  # looks twice a second
    beating = threading.Timer(0.3, write, (tmp_path, 2), {"turns": 2})
    beating.start()
    died = own.reason_of(LOST)
    beating.join()
    assert str(died).startswith("rank 1 on node1 died at step 0")
    start = time.monotonic()
    assert own.reason_of(ValueError("a bug")) is None
    assert time.monotonic() - start < 0.3, "an error of its own waits for nobody"
    (tmp_path / "stalled").write_text("no progress for 60 s: rank 1")  # another one has given up and said why
    died = own.reason_of(LOST)
    assert str(died) == "no progress for 60 s: rank 1"
    assert not died.speaks


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="use seconds above 0"):
        StopWhenStalled("x", timeout=0)


def fit_on_two_ranks(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "hanging.py").write_text(HANG, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and name != "WORLD_SIZE"}
    environment |= {"OMP_NUM_THREADS": "1", "KEXUE_ALLOW_TARGETS": "hanging"}
    environment["PYTHONPATH"] = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [
            *(sys.executable, "-m", "kexue.cli", "fit", "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"),
            *("logger=csv", f"run_dir={folder / 'run'}", "trainer.enable_model_summary=false", *words),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=folder,
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_process_that_was_killed_is_named_last(rank: int, tmp_path: Path) -> None:
    """Rank 0 is the process that was started; with it goes what started the other one."""
    done = fit_on_two_ranks(tmp_path, "+callbacks.die._target_=hanging.Die", f"+callbacks.die.rank={rank}")
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    assert done.returncode == (1 if rank else -9), done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(rf"kexue: rank {rank} on \S+ died at step 3, training", last), done.stderr
    assert ("rank 1 was ended by SIGKILL" in last) == (rank == 1)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "ranks" / f"sign-{1 - rank}.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("hang", "no progress for 8 s: rank 0 on"),  # both are in the same step: the places tell them apart
        ("freeze", "no sign of life for 6 s from rank 1 on"),
    ],
)
def test_every_process_ends_and_one_says_why(how: str, said: str, tmp_path: Path) -> None:
    limits = {"hang": (8, 60), "freeze": (60, 6)}[how]
    begin = time.monotonic()
    done = fit_on_two_ranks(
        tmp_path,
        *(f"callbacks.stall.timeout={limits[0]}", f"callbacks.stall.dead_after={limits[1]}"),
        *("+callbacks.hang._target_=hanging.Hang", f"+callbacks.hang.how={how}"),
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count(said) == 1
    place = r"rank 1 on \S+ at step 3, training, in on_train_batch_start \(hanging\.py:\d+\)"
    assert re.search(place if how == "hang" else "last seen at step", done.stderr)
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begin < 180
    stack = (tmp_path / "run" / "ranks" / "stack-0.txt").read_text()
    assert "all_reduce" in stack or "backward" in stack or "Reducer" in stack
    if how == "hang":
        assert "hanging.py" in (tmp_path / "run" / "ranks" / "stack-1.txt").read_text()
