"""kill -9 at random moments of training and saving; each time the run goes on from the newest complete checkpoint.

A tiny model with dropout, a shuffled order, a scheduler and Lookahead is trained on one process, under DDP, and under
ZeRO stages 2 and 3 on two CPU processes, and saves every second step. Again and again one process is killed, half of
the time while it writes a checkpoint; how long the others live on and what they say is noted. Every loss that any
process computed, in however many attempts, is compared with that of a run that nobody disturbed, and so are the final
weights: a difference in the last bit counts.

    OMP_NUM_THREADS=1 python benchmarks/kill_test.py [--kills 100] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401 - imported once, before the processes are forked
import pytorch_lightning as pl
import torch
from common import report
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kexue.callbacks import Checkpoints
from kexue.strategies import DDP, Lookahead, SingleDevice, Zero, load_weights, newest

SETTINGS = {"single": 1, "ddp": 2, "zero_2": 2, "zero_3": 2}
EPOCHS, STEPS = 3, 36
PATIENCE = 60.0
"""Seconds after which a process that lives on is said to hang."""
FIELDS = struct.Struct("qqd")
"""What a process shares: its steps, the number of its saves (odd while it saves), the seconds that the last took."""


class Shared:
    """One record for each process, in memory that all of them see."""

    def __init__(self, processes: int) -> None:
        self.memory = mmap.mmap(-1, FIELDS.size * processes)

    def put(self, rank: int, steps: int, saves: int, seconds: float) -> None:
        """Write a record."""
        FIELDS.pack_into(self.memory, FIELDS.size * rank, steps, saves, seconds)

    def get(self, rank: int) -> tuple[int, int, float]:
        """Read a record."""
        return FIELDS.unpack_from(self.memory, FIELDS.size * rank)


class Model(pl.LightningModule):
    def __init__(self, record: Path) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.Linear(64, 3))
        self.file = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        # At once: by the end of the step it may be in a checkpoint, and will not be computed again.
        os.write(self.file, f"{self.global_step + 1} {loss.item().hex()}\n".encode())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watched(Checkpoints):
    """Checkpoints that say when they are being written."""

    def __init__(self, folder: Path, shared: Shared, rank: int) -> None:
        super().__init__(folder, every_n_steps=2)
        self.shared, self.rank = shared, rank

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        _, saves, seconds = self.shared.get(self.rank)
        self.shared.put(self.rank, trainer.global_step, saves, seconds)
        super().on_train_batch_end(trainer, *args)

    def _save(self, trainer: pl.Trainer, value: float | None) -> None:
        steps, saves, seconds = self.shared.get(self.rank)
        self.shared.put(self.rank, steps, saves + 1, seconds)
        started = time.monotonic()
        super()._save(trainer, value)
        self.shared.put(self.rank, steps, saves + 2, time.monotonic() - started)


def train(setting: str, rank: int, port: int, folder: Path, checkpoint: Path | None, shared: Shared) -> None:
    """Be one process of a run."""
    world = SETTINGS[setting]
    place = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}})
    warnings.filterwarnings("ignore")
    pl.seed_everything(1, verbose=False)
    model = Model(folder / f"losses.{rank}")
    techniques = [Lookahead(k=3)]
    strategy: Any = SingleDevice(techniques) if setting == "single" else DDP(techniques, process_group_backend="gloo")
    if setting.startswith("zero"):
        strategy = Zero(stage=int(setting[-1]), techniques=techniques)
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(96, 16, generator=generator), torch.randint(0, 3, (96,), generator=generator))
    sampler = DistributedSampler(data, num_replicas=world, rank=rank)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_epochs=EPOCHS,
        callbacks=[Watched(folder / "checkpoints", shared, rank)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    torch.manual_seed(100 + rank)
    trainer.fit(model, DataLoader(data, batch_size=8 // world, sampler=sampler), ckpt_path=checkpoint)
    assert trainer.global_step == STEPS
    if rank == 0:
        weights = load_weights(folder / "checkpoints" / "last.ckpt")
        digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights)))
        (folder / "weights").write_text(digest.hexdigest())


def start(setting: str, folder: Path, shared: Shared) -> list[int]:
    """Fork the processes of a run, which goes on from the newest complete checkpoint; return their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    checkpoint = newest(folder / "checkpoints")
    processes = []
    for rank in range(SETTINGS[setting]):
        shared.put(rank, 0, 0, 0.02)
        process = os.fork()
        if process == 0:
            log = os.open(folder / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                train(setting, rank, port, folder, checkpoint, shared)
                code = 0
            except BaseException as error:
                text = str(error).strip().splitlines() or [""]
                (folder / f"error.{rank}").write_text(f"{type(error).__name__}: {text[0]}")
            finally:
                os._exit(code)
        processes.append(process)
    return processes


def wait(processes: Sequence[int], patience: float) -> dict[int, tuple[float, int]]:
    """Wait for processes to end; return the seconds and the exit status of those that did, and kill the others."""
    started, ended = time.monotonic(), {}
    while len(ended) < len(processes) and time.monotonic() - started < patience:
        for process in processes:
            if process not in ended:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    ended[process] = time.monotonic() - started, status
        time.sleep(0.005)
    for process in set(processes) - set(ended):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return ended


@dataclass
class Score:
    """What happened to one setting."""

    training: int = 0
    saving: int = 0
    runs: int = 0
    losses: int = 0
    wrong: int = 0
    missing: int = 0
    hanging: int = 0
    slowest: float = 0.0
    said: Counter[str] = field(default_factory=Counter)


def kill_once(processes: list[int], shared: Shared, chance: random.Random, score: Score, folder: Path) -> bool:
    """Kill one process at a random moment and see how the others end; False if the run was done before."""
    victim, in_save = chance.randrange(len(processes)), chance.random() < 0.5
    count, share = chance.randint(1, 4 if in_save else 8), chance.random()
    first = 0
    while True:
        steps, saves, seconds = shared.get(victim)
        first = first or steps
        reached = saves == 2 * count - 1 if in_save else steps and steps - first >= count and not saves % 2
        if reached:
            time.sleep(share * (1.2 * seconds if in_save else 0.005))
            break
        done, status = os.waitpid(processes[0], os.WNOHANG)
        if done:
            assert status == 0, (folder / "error.0").read_text()
            ended = wait(processes[1:], PATIENCE)
            assert all(status == 0 for _, status in ended.values())
            return False
        time.sleep(0.0002)
    saving = shared.get(victim)[1] % 2
    os.kill(processes[victim], signal.SIGKILL)
    done, status = os.waitpid(processes[victim], 0)
    others = [process for process in processes if process != processes[victim]]
    ended = wait(others, PATIENCE)
    if not os.WIFSIGNALED(status):  # it was done a moment before
        return False
    score.saving += saving
    score.training += not saving
    score.hanging += len(others) - len(ended)
    score.slowest = max([score.slowest, *(seconds for seconds, _ in ended.values())])
    for rank, process in enumerate(processes):
        if process in ended:
            error = folder / f"error.{rank}"
            score.said[_name(error.read_text()) if error.is_file() else f"exit status {ended[process][1]}"] += 1
    return True


def _name(error: str) -> str:
    """An error without its addresses, so that equal ones are counted together."""
    known = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return next((f"{error.partition(':')[0]}: {text}" for text in known if text in error), error[:100])


def losses(folder: Path) -> list[tuple[int, int, str]]:
    """All losses that were written: process, step, value to the last bit."""
    return [
        (int(file.suffix[1:]), int(line.split()[0]), line.split()[1])
        for file in sorted(folder.glob("losses.*"))
        for line in file.read_text().splitlines()
    ]


def undisturbed(setting: str, folder: Path) -> tuple[dict[tuple[int, int], str], str]:
    """Train once without a kill; return each loss and the weights."""
    folder.mkdir()
    ended = wait(start(setting, folder, Shared(SETTINGS[setting])), 10 * PATIENCE)
    errors = [file.read_text() for file in folder.glob("error.*")]
    assert len(ended) == SETTINGS[setting], "the undisturbed run hangs"
    assert not errors, errors
    return {(rank, step): loss for rank, step, loss in losses(folder)}, (folder / "weights").read_text()


def test(setting: str, kills: int, chance: random.Random, root: Path) -> Score:
    """Kill so many times; then, and whenever a run is done, compare what it computed."""
    score, shared = Score(), Shared(SETTINGS[setting])
    expected, weights = undisturbed(setting, root / "undisturbed")
    folder = root / "killed"
    while score.training + score.saving < kills or folder.exists():
        folder.mkdir(exist_ok=True)
        for file in folder.glob("error.*"):
            file.unlink()
        processes = start(setting, folder, shared)
        if score.training + score.saving < kills:
            if kill_once(processes, shared, chance, score, folder):
                continue
        else:
            ended = wait(processes, 10 * PATIENCE)
            assert [status for _, status in ended.values()] == [0] * len(processes), [
                file.read_text() for file in folder.glob("error.*")
            ]
        written = losses(folder)
        score.runs += 1
        score.losses += len(written)
        score.wrong += sum(expected[rank, step] != loss for rank, step, loss in written)
        score.missing += len(set(expected) - {(rank, step) for rank, step, _ in written})
        score.wrong += (folder / "weights").read_text() != weights
        shutil.rmtree(folder)
    return score


def main() -> None:
    """Run the test and print the table; exit with 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows, failed = [], False
    for index, setting in enumerate(SETTINGS):
        kills = arguments.kills // len(SETTINGS) + (index < arguments.kills % len(SETTINGS))
        with tempfile.TemporaryDirectory() as root:
            score = test(setting, kills, random.Random(f"{arguments.seed}-{setting}"), Path(root))
        failed |= bool(score.wrong or score.missing or score.hanging)
        rows.append(
            {
                "setting": setting,
                "processes": SETTINGS[setting],
                "killed in training": score.training,
                "killed in saving": score.saving,
                "runs done": score.runs,
                "losses compared": score.losses,
                "different": score.wrong,
                "missing": score.missing,
                "others hang": score.hanging,
                "others end after s": round(score.slowest, 2),
                "they say": "; ".join(f"{error} ({count})" for error, count in score.said.most_common()),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    report("kill -9 at random moments, resumed each time from the newest complete checkpoint", rows, arguments.json)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
