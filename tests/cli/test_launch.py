"""Runs of two processes, started by the command line itself: one run directory, one exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FAIL = """
import os
import pytorch_lightning as pl
from kexue.errors import InputError

class Fail(pl.Callback):
    def __init__(self, how: str, rank: int) -> None:
        self.how, self.rank = how, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1 and self.rank in (trainer.global_rank, -1):
            if self.how == "input":
                raise InputError(f"row 7 is wrong on rank {trainer.global_rank}")
            if self.how == "kill":
                os.kill(os.getpid(), 9)
            raise ValueError(f"a bug on rank {trainer.global_rank}")
"""
COMMON = ["debug=fast", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.enable_model_summary=false"]


def kexue(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kexue.cli", "fit", *COMMON, f"run_dir={folder}", *words]
    clean = {name: value for name, value in os.environ.items() if "RANK" not in name and name != "WORLD_SIZE"}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder.parent,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero_2", marks=pytest.mark.slow)])
def test_two_processes_share_a_run(strategy: str, tmp_path: Path) -> None:
    done = kexue(tmp_path / "run", f"strategy={strategy}", "technique=[lookahead]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything lies in") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert "test/digit_accuracy" in json.loads((tmp_path / "run" / "metrics.json").read_text())
    steps = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert steps[0].startswith("step,")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "rank", "code", "said", "unsaid"),
    [
        ("input", 0, 2, "kexue: row 7 is wrong on rank 0", "Traceback"),
        ("input", 1, 2, "kexue: row 7 is wrong on rank 1", "Traceback"),
        ("input", -1, 2, "kexue: row 7 is wrong on rank", "Traceback"),
        ("bug", 0, 1, "ValueError: a bug on rank 0", "kexue: "),
        ("bug", 1, 1, "ValueError: a bug on rank 1", "kexue: "),
        ("kill", 1, 1, "kexue: rank 1 on", "Traceback"),
    ],
)
def test_a_failure_of_any_rank_ends_the_run(
    how: str, rank: int, code: int, said: str, unsaid: str, tmp_path: Path
) -> None:
    (tmp_path / "failing.py").write_text(FAIL, encoding="utf-8")
    callback = [f"+callbacks.f.{key}={value}" for key, value in (("how", how), ("rank", rank))]
    done = kexue(
        tmp_path / "run",
        "strategy=ddp",
        "+callbacks.f._target_=failing.Fail",
        *callback,
        PYTHONPATH=str(tmp_path),
        KEXUE_ALLOW_TARGETS="failing",
    )
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert unsaid not in done.stderr
    if how == "kill":
        assert done.stderr.splitlines()[-1].endswith(
            "died at step 1, training; the process of rank 1 was ended by SIGKILL (out of memory?)"
        )
    if code == 2:
        assert done.stderr.count("row 7") == 1
    assert not list((tmp_path / "run").glob(".error-*"))
