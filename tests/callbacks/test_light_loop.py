"""Hooks that a callback only inherits are not called at every step, and no profiler is made for nobody."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kexue.callbacks.light_loop import PER_BATCH, NoProfiler, lighten, skip_unused_hooks


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


def test_no_profiler_unless_asked_for() -> None:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=2, enable_model_summary=False, callbacks=[Counts()], **options)
    lighten(trainer)
    assert isinstance(trainer.profiler, NoProfiler)
    trainer.fit(Module(), DataLoader(torch.ones(3, 2), batch_size=1))  # type: ignore[arg-type]
    assert trainer.global_step == 2
    assert trainer.callbacks[0].on_before_backward is None
    asked = pl.Trainer(max_steps=2, enable_model_summary=False, profiler="simple", **options)
    lighten(asked)
    asked.fit(Module(), DataLoader(torch.ones(3, 2), batch_size=1))  # type: ignore[arg-type]
    assert "run_training_batch" in asked.profiler.recorded_durations
    with asked.profiler.profile("a"), asked.profiler.profile("b"):
        pass
    with pytest.raises(ValueError, match="inside"), NoProfiler().profile("a"):
        raise ValueError("inside")
