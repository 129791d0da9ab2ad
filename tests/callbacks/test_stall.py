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


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match="use seconds above 0"):
        StopWhenStalled("x", timeout=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("hang", "no progress for 8 s: rank 0 on"),  # both are in the same step: the places tell them apart
        ("freeze", "no sign of life for 6 s from rank 1 on"),
    ],
)
def test_every_process_ends_and_one_says_why(how: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANG, encoding="utf-8")
    limits = {"hang": (8, 60), "freeze": (60, 6)}[how]
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and name != "WORLD_SIZE"}
    environment |= {"OMP_NUM_THREADS": "1", "KEXUE_ALLOW_TARGETS": "hanging"}
    environment["PYTHONPATH"] = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    begin = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kexue.cli", "fit", "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"),
            *("logger=csv", f"run_dir={tmp_path / 'run'}", "trainer.enable_model_summary=false"),
            *(f"callbacks.stall.timeout={limits[0]}", f"callbacks.stall.dead_after={limits[1]}"),
            *("+callbacks.hang._target_=hanging.Hang", f"+callbacks.hang.how={how}"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        cwd=tmp_path,
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
