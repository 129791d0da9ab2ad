"""The disk is full in the middle of a run: one named error, and the last checkpoint is whole."""

from __future__ import annotations

import csv
import errno
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kexue.cli.errors import explain
from kexue.strategies.checkpoints import reason_of, unwritten

FILL = """
import pytorch_lightning as pl

class Fill(pl.Callback):
    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._fill)

    def _fill(self, trainer, *_) -> None:
        if trainer.global_step < self.step or not trainer.is_global_zero:
            return
        with open(f"{trainer.default_root_dir}/filler", "ab", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                try:
                    while file.write(bytes(size)) == size:
                        pass
                except OSError:
                    pass
"""
# A disk of its own, without root: a tmpfs of a namespace that ends with the shell, so what is on it is carried out.
DISK = """
mount -t tmpfs -o size=24m tmpfs "$1" || exit 99
cd "$1"
shift
out="$1"
shift
"$@"
code=$?
rm -f run/filler
cp -a run "$out"
exit $code
"""
STEPS = 27  # three epochs of nine steps


def fit(folder: Path, *words: str, disk: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and name != "WORLD_SIZE"}
    environment |= {"OMP_NUM_THREADS": "1", "KEXUE_ALLOW_TARGETS": "filling", "WANDB_MODE": "offline"}
    environment["PYTHONPATH"] = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    command = [
        *(sys.executable, "-m", "kexue.cli", "fit", "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu"),
        *("run_dir=run", "trainer.max_epochs=3", "trainer.enable_model_summary=false", "trainer.log_every_n_steps=1"),
        *("callbacks.confusion_matrix=null", *words),
    ]
    if disk:
        (folder / "disk").mkdir()
        place = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", DISK, "bash", str(folder / "disk")]
        command = [*place, str(folder / "run"), *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=folder)


class Full(io.RawIOBase):
    """A file on a full disk."""

    def writable(self) -> bool:
        return True

    def write(self, _: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_system_s_reason_lies_below_torch_s() -> None:
    with pytest.raises((OSError, RuntimeError)) as caught:
        torch.save({"weight": torch.ones(9)}, Full())
    error = unwritten("run/step=1.ckpt", reason_of(caught.value), " by process 1")
    assert error.errno == errno.ENOSPC
    line = explain(error)
    assert line is not None
    assert line.startswith("run/step=1.ckpt could not be written by process 1 (No space left on device); the checkpoin")
    assert line.endswith("are untouched: no space left on the disk; free some, or choose run_dir=PATH")
    other = unwritten("a.ckpt", reason_of(RuntimeError("unexpected pos 64 vs 0")))
    assert str(other).startswith("a.ckpt could not be written (unexpected pos 64 vs 0); ")
    assert explain(other) is None, "a bug, for all that is known"


def losses(folder: Path) -> dict[int, str]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")}


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "step"), [("on_validation_end", 18), ("on_train_batch_start", 20)])
def test_a_full_disk_is_one_line_and_the_run_goes_on(hook: str, step: int, tmp_path: Path) -> None:
    """Full when a checkpoint is to be written, and when the next row of metrics.csv is."""
    (tmp_path / "filling.py").write_text(FILL, encoding="utf-8")
    begin = time.monotonic()
    words = ("+callbacks.fill._target_=filling.Fill", f"+callbacks.fill.hook={hook}", f"+callbacks.fill.step={step}")
    done = fit(tmp_path, *words, disk=True)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no file system of its own for this user: {done.stderr}")
    assert time.monotonic() - begin < 120
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("kexue: ") == 1, done.stderr
    assert "o space left on" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    run = tmp_path / "run"
    last = (run / "checkpoints" / "last.ckpt").readlink().name
    assert last == f"step={9 * ((step - 1) // 9 if hook == 'on_validation_end' else step // 9):08d}.ckpt"
    again = fit(tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"from {run / 'checkpoints' / last}" in again.stderr + again.stdout
    assert list(losses(run)) == list(range(STEPS))
