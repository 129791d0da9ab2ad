"""A signal at any moment of a run: a checkpoint, exit code 75, and a continued run that equals an uninterrupted one."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from ranks import run_ranks
from torch.utils.data import DataLoader, TensorDataset

from kexue.callbacks import Checkpoints, Preemption
from kexue.signals import STOP_SIGNALS, Preempted, installed
from kexue.strategies import DDP, SingleDevice, Zero, newest

ROWS, EPOCHS = 24, 3


class Noisy(pl.LightningModule):
    """What must continue exactly: dropout, a shuffling loader, a scheduler, a validation that draws numbers."""

    def __init__(self, plateau: bool = False) -> None:
        super().__init__()
        self.plateau = plateau
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.losses: list[tuple[int, float]] = []
        self.validated: list[tuple[int, float]] = []
        self.drawn = 0.0

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.net(batch[0]).square().mean()
        self.losses.append((self.trainer.fit_loop.epoch_loop.total_batch_idx, loss.item()))
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.drawn = float(torch.rand(()))
        self.log("val/loss", self.net(batch[0]).square().mean() + 0.01 * self.drawn)

    def on_validation_end(self) -> None:
        self.validated.append((self.trainer.global_step, float(self.trainer.callback_metrics["val/loss"])))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        step = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
        scheduler = plateau if self.plateau else step
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "epoch", "monitor": "val/loss"},
        }


class SignalAt(pl.Callback):
    """Sends itself a signal when a hook is called for the n-th time."""

    def __init__(self, hook: str, call: int, number: int = signal.SIGUSR1, rank: int = 0) -> None:
        self.left = call
        self.number, self.rank = number, rank
        setattr(self, hook, self._count)

    def _count(self, trainer: pl.Trainer, *_: Any) -> None:
        self.left -= 1
        if self.left == 0 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def fit(folder: Path, base: str, *callbacks: pl.Callback, devices: int = 1, **options: Any) -> Noisy:
    pl.seed_everything(5, verbose=False)
    model = Noisy(options.pop("plateau", False))
    uneven = options.pop("uneven", False) and os.environ.get("RANK") == "1"
    bases = {"single": SingleDevice, "ddp": lambda: DDP(process_group_backend="gloo")}
    strategy = bases[base]() if base in bases else Zero(int(base[-1]))
    data = TensorDataset(torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1)))
    monitor = None if options.get("limit_val_batches") == 0 else "val/loss"
    saver = Checkpoints(folder / "checkpoints", monitor=monitor) if options.pop("saver", True) else None
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=EPOCHS,
        callbacks=[Preemption(), *([saver] if saver else []), *callbacks],
        default_root_dir=folder,
        use_distributed_sampler=False,
        num_sanity_val_steps=1,
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, **options},
        **({} if saver else {"enable_checkpointing": False}),
    )
    resume = newest(folder / "checkpoints")
    train = DataLoader(data, batch_size=4, shuffle=True)
    try:
        trainer.fit(model, train, DataLoader(data, batch_size=12 if uneven else 6), ckpt_path=resume, weights_only=True)
    finally:
        model.best = saver.best_value if saver else None  # type: ignore[assignment]
    return model


def fit_until_done(folder: Path, base: str, *events: SignalAt, **options: Any) -> tuple[list, list, Any, dict, int]:
    """Fit with one event in each run, as a scheduler would start it again; return what all runs saw together."""
    losses: dict[int, float] = {}
    validated: dict[int, float] = {}
    restarts = 0
    for event in (*events, None):
        seen: list[Noisy] = []
        try:
            model = fit(folder, base, *([event] if event else []), _Keep(seen), **options)
        except Preempted:
            request = installed()
            assert request is not None, "what comes on the way out is still only noted"
            request.restore()  # this process goes on, others end
            model, restarts = seen[0], restarts + 1
        steps = [step for step, _ in model.losses]
        # Batches of an open window go again; no other does, and none is left out.
        assert not losses or not steps or steps[0] <= max(losses) + 1
        if options.get("accumulate_grad_batches", 1) == 1:
            assert not set(steps) & set(losses)
        losses.update(model.losses)
        validated.update(model.validated)
    weights = {name: tensor.clone().numpy() for name, tensor in model.state_dict().items()}
    return sorted(losses.items()), sorted(validated.items()), model.best, weights, restarts


class _Keep(pl.Callback):
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.seen.append(pl_module)


# Six batches and four of validation in an epoch.
MOMENTS = {
    "before the first step": ("on_train_start", 1),
    "in a step": ("on_train_batch_start", 3),
    "in the backward pass": ("on_before_backward", 9),
    "at the end of a step": ("on_before_zero_grad", 4),
    "in the last step of an epoch": ("on_train_batch_start", 6),
    "at the start of a validation": ("on_validation_start", 3),
    "in a validation": ("on_validation_batch_start", 6),
    "in the last batch of a validation": ("on_validation_batch_start", 9),
    "at the end of an epoch": ("on_train_epoch_end", 1),
    "in the last step of all": ("on_train_batch_start", 18),
    "in the last validation": ("on_validation_batch_start", 12),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "validated in mid-epoch": {"val_check_interval": 3},
    "accumulated": {"accumulate_grad_batches": 4},
    "accumulated, validated in mid-window": {"accumulate_grad_batches": 4, "val_check_interval": 2},
    "without validation": {"limit_val_batches": 0},
    "no callback for checkpoints": {"saver": False},
    "plateau": {"plateau": True},
}


def equal(run: tuple, whole: tuple) -> None:
    for mine, theirs in zip(run[:3], whole[:3], strict=True):
        assert mine == theirs
    assert all((run[3][name] == whole[3][name]).all() for name in whole[3])


@pytest.mark.parametrize("options", OPTIONS)
def test_a_signal_at_any_moment(options: str, tmp_path: Path) -> None:
    chosen = OPTIONS[options]
    whole = fit_until_done(tmp_path / "whole", "single", **chosen)
    for number, (moment, (hook, call)) in enumerate(MOMENTS.items()):
        if "validation" in moment and options == "without validation":
            continue
        run = fit_until_done(tmp_path / str(number), "single", SignalAt(hook, call), **chosen)
        equal(run, whole)
        # A run that is through before the signal can be answered ends as usual.
        assert run[4] == (0 if (moment, options) == ("in the last step of all", "without validation") else 1), moment
    assert installed() is None


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_all_three_signals_twice_in_a_row(number: int, tmp_path: Path) -> None:
    events = [SignalAt("on_before_backward", 4, number), SignalAt("on_before_backward", 4, number)]
    run = fit_until_done(tmp_path / "run", "single", *events)
    assert run[4] == 2
    equal(run, fit_until_done(tmp_path / "whole", "single"))


class Storm(pl.Callback):
    """A signal every millisecond, of each kind in turn, from the first step until the process is asked no more."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.sent = 0

    def on_train_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), STOP_SIGNALS[0])
        threading.Thread(target=self._send, daemon=True).start()

    def _send(self) -> None:
        while not self.over.wait(0.001):
            os.kill(os.getpid(), STOP_SIGNALS[self.sent % 3])
            self.sent += 1


def test_signals_while_saving_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storm, write = Storm(), torch.save

    def slowly(*args: Any, **kwargs: Any) -> None:
        before = storm.sent
        wait_until(lambda: storm.sent > before + 30)
        write(*args, **kwargs)
        wait_until(lambda: storm.sent > before + 60)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", slowly)
        with pytest.raises(Preempted, match=r"asked to stop \(SIGUSR1\) at step 1"):
            fit(tmp_path, "single", storm)
    storm.over.set()
    time.sleep(0.05)
    request = installed()
    assert request is not None
    request.restore()
    assert storm.sent >= 60
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if not path.is_symlink()] == [
        "step=00000001.ckpt"
    ]
    rest, whole = fit_until_done(tmp_path, "single"), fit_until_done(tmp_path / "whole", "single")
    equal(rest, (whole[0][1:], whole[1][1:], *whole[2:]))  # without the step and the sanity check of the first run


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_test_is_left_and_nothing_saved(tmp_path: Path) -> None:
    class Tested(Noisy):
        tested = 0

        def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.tested += 1

    model = Tested()
    trainer = pl.Trainer(
        accelerator="cpu",
        callbacks=[Preemption(), SignalAt("on_test_batch_start", 2)],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
    )
    with pytest.raises(Preempted, match="SIGUSR1"):
        trainer.test(model, DataLoader(TensorDataset(torch.randn(ROWS, 4)), batch_size=4), verbose=False)
    request = installed()
    assert request is not None
    request.restore()
    assert model.tested == 2
    assert not list(tmp_path.iterdir())


def test_lightnings_handlers_stay_away(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.extend(signal.getsignal(number) for number in STOP_SIGNALS)

    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    fit(tmp_path, "single", Look(), max_steps=1)
    assert {type(handler).__name__ for handler in seen} == {"StopRequest"}
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


DISTRIBUTED = {
    "in a step": ("on_before_backward", 9),
    "in the last step of an epoch": ("on_train_batch_start", 6),
    "in a validation": ("on_validation_batch_start", 6),
}


# Asking at each batch of an uneven validation would let one process wait for the other: the next step answers.
UNEVEN = {"in a validation": ("on_validation_batch_start", 4)}


def on_two_ranks(folder: str, bases: list[str]) -> dict[str, list[Any]]:
    """For each base the uninterrupted run and one for each moment, the signal going to the second process alone."""
    found: dict[str, list[Any]] = {}
    for base in bases:
        root, options = Path(folder) / base, {"devices": 2, "uneven": base == "uneven"}
        name = "ddp" if base == "uneven" else base
        found[base] = [fit_until_done(root / "whole", name, **options)]
        for moment, (hook, call) in (UNEVEN if base == "uneven" else DISTRIBUTED).items():
            found[base].append(fit_until_done(root / moment, name, SignalAt(hook, call, rank=1), **options))
    return found


@pytest.mark.parametrize(
    "bases", [["ddp", "uneven", "zero_2"], pytest.param(["zero_1", "zero_3"], marks=pytest.mark.slow)]
)
def test_one_process_that_was_asked_suffices(bases: list[str], tmp_path: Path) -> None:
    for found in run_ranks(on_two_ranks, 2, str(tmp_path), bases):
        for base in bases:
            whole, *runs = found[base]
            assert {run[4] for run in runs} == {1}, base
            for run in runs:
                equal(run, whole)


def test_a_foreign_strategy_and_no_checkpoints(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[Preemption(), SignalAt("on_train_batch_start", 3)],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(Preempted):
        trainer.fit(Noisy(), DataLoader(TensorDataset(torch.randn(ROWS, 4)), batch_size=4))
    request = installed()
    assert request is not None
    request.restore()
    assert newest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step=00000003.ckpt"
