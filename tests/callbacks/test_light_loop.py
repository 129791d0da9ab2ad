"""What is left out of a step is what nobody uses: a run with LightLoop ends with the numbers of one without."""

from __future__ import annotations

import copy
import cProfile
import pickle
import pstats
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultCollection
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from kexue.callbacks.light_loop import PER_BATCH, TRAINING, LightLoop, NoProfiler, skip_unused_hooks
from kexue.callbacks.light_results import LightResults


class Counts(pl.Callback):
    """Overrides one hook of a batch."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


class CountsMore(Counts):
    """Calls the inherited hooks, one of which its base class has not got."""

    def on_train_batch_start(self, *args: Any) -> None:
        super().on_train_batch_start(*args)
        self.batches += 10


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def calls(callbacks: list[pl.Callback], monkeypatch: pytest.MonkeyPatch) -> int:
    """Train three batches; the number of hooks of callbacks that Lightning called."""
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks,
    )  # fmt: skip
    profiled: list[str] = []
    start = type(trainer.profiler).start
    monkeypatch.setattr(
        type(trainer.profiler), "start", lambda self, name: (profiled.append(name), start(self, name))[1]
    )
    trainer.fit(Module(), DataLoader(torch.ones(3, 2), batch_size=1))  # type: ignore[arg-type]
    monkeypatch.undo()
    return sum(name.startswith("[Callback]") and name.split(".")[-1] in PER_BATCH for name in profiled)


def test_only_what_is_overridden_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, more = Counts(), CountsMore()
    skip_unused_hooks([counts, more])
    assert calls([counts, more], monkeypatch) == 3 * (1 + 2)
    assert (counts.batches, more.batches) == (3, 33)
    assert calls([Counts()], monkeypatch) == 3 * 6


def test_again_and_in_copies() -> None:
    counts = Counts()
    skip_unused_hooks([counts])
    skip_unused_hooks([counts])
    for copied in (copy.deepcopy(counts), pickle.loads(pickle.dumps(counts))):
        assert copied.on_before_backward is None
        copied.on_train_batch_end()
        assert copied.batches == 1


def test_hooks_of_the_object_are_kept() -> None:
    counts = Counts()
    counts.on_before_backward = called = lambda *args: None  # type: ignore[method-assign]
    skip_unused_hooks([counts])
    assert counts.on_before_backward is called


def test_every_hook_of_a_batch_is_known() -> None:
    """A version of Lightning with another hook for each batch would have it called for nothing."""
    named = {name for name in vars(pl.Callback) if "batch" in name or "before" in name or "after" in name}
    assert named == set(PER_BATCH)


def trainer_of(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **{**quiet, **options})


def rows(count: int = 3) -> Any:
    return DataLoader(torch.arange(2.0 * count).view(count, 2) / count, batch_size=1)  # type: ignore[arg-type]


def test_no_profiler_unless_asked_for() -> None:
    trainer = trainer_of(Counts(), LightLoop(), max_steps=2)
    trainer.fit(Module(), rows())
    assert isinstance(trainer.profiler, NoProfiler)
    assert trainer.global_step == 2
    assert trainer.callbacks[0].on_before_backward is None
    asked = trainer_of(LightLoop(), max_steps=2, profiler="simple")
    asked.fit(Module(), rows())
    assert "run_training_batch" in asked.profiler.recorded_durations
    with asked.profiler.profile("a"), asked.profiler.profile("b"):
        pass
    with pytest.raises(ValueError, match="inside"), NoProfiler().profile("a"):
        raise ValueError("inside")


# The module


class Hooked(Module):
    """Overrides two hooks of a step, one of them on the object only."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.on_before_backward = lambda loss: self.seen.append("before")  # type: ignore[method-assign]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.seen.append("start")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.left_out = [hook for hook in TRAINING if getattr(self, hook) is None]
        if batch_idx == 5:
            raise ValueError("in the middle")
        return super().training_step(batch, batch_idx)


def test_hooks_of_the_module_that_do_something_are_called() -> None:
    module = Hooked()
    trainer_of(LightLoop(), max_epochs=1).fit(module, rows())
    assert module.seen == ["start", "before"] * 3
    assert module.left_out == [hook for hook in TRAINING if hook not in ("on_train_batch_start", "on_before_backward")]


@pytest.mark.parametrize("count", [3, 6])
def test_the_module_has_its_hooks_again_when_the_run_has_ended(count: int) -> None:
    module = Hooked()
    try:
        trainer_of(LightLoop(), max_epochs=1).fit(module, rows(count))
    except ValueError:
        assert count == 6
    assert all(callable(getattr(module, hook)) for hook in TRAINING)
    assert "on_train_batch_end" not in vars(module)
    assert "on_before_backward" in vars(module)


# Logged values


class Logs(Module):
    """Logs everything there is, with options and values that change."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, batch_size=2 + batch_idx)
        self.log("both", loss * 2, on_step=True, on_epoch=True, prog_bar=True)
        self.log("number", float(batch_idx))
        self.log("most", loss, reduce_fx="max", on_step=False, on_epoch=True)
        self.log("sum", loss.double(), reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        self.log_dict({"a": loss + 1, "b": torch.tensor(batch_idx)}, on_epoch=True)
        self.metric(loss.detach())
        self.log("metric", self.metric, on_step=True, on_epoch=True)
        if batch_idx == 1:
            self.log("sometimes", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("loss", outputs["loss"] + 5, on_epoch=True)  # the same name by another hook

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", self.layer(batch).square().mean())
        self.log("val/last", self.layer(batch).mean(), on_step=True, on_epoch=False)

    test_step = validation_step


class Kept(Logger):
    """Keeps what it is given."""

    name = version = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def logged(callbacks: list[pl.Callback], loaders: int) -> tuple[Any, ...]:
    torch.manual_seed(0)
    module, kept = Logs(), Kept()
    trainer = trainer_of(*callbacks, max_epochs=3, logger=kept, log_every_n_steps=2)
    trainer.fit(module, rows(5), [rows(3)] * loaders)
    after_fit = {**trainer.callback_metrics, **trainer.logged_metrics, **trainer.progress_bar_metrics}
    trainer.test(module, [rows(4)] * loaders, verbose=False)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, rows(5), [rows(3)] * loaders)
    return kept.rows, after_fit, trainer.callback_metrics, type(trainer.fit_loop.epoch_loop._results)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loaders", [1, 2])
def test_every_logged_number_is_the_same(loaders: int) -> None:
    *numbers, kind = logged([LightLoop()], loaders)
    *usual, usual_kind = logged([], loaders)
    assert numbers == usual
    assert len(numbers[0]) > 10
    assert "both_epoch" in numbers[2]
    assert (kind, usual_kind) == (LightResults, _ResultCollection)


@pytest.mark.filterwarnings("ignore")
def test_logging_a_name_twice_with_other_options_is_refused_as_ever() -> None:
    class Twice(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=batch_idx == 2)
            return loss

    with pytest.raises(MisconfigurationException, match="twice in `training_step` with different arguments"):
        trainer_of(LightLoop(), max_epochs=1).fit(Twice(), rows())


class Simple(Module):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


@pytest.mark.filterwarnings("ignore")
def test_a_step_takes_fewer_calls_than_a_bare_trainers() -> None:
    def calls(*callbacks: pl.Callback) -> float:
        totals = []
        for count in (20, 120):
            profile = cProfile.Profile()
            profile.runcall(trainer_of(*callbacks, max_epochs=1).fit, Simple(), rows(count))
            totals.append(pstats.Stats(profile).total_calls)  # pyright: ignore[reportAttributeAccessIssue]
        return (totals[1] - totals[0]) / 100

    assert calls(LightLoop()) < 0.6 * calls()
