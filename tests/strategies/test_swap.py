"""Exchanging weights, and when a strategy asks a technique to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import MODULES, loader
from torch import Tensor, nn

from kexue.errors import InputError
from kexue.strategies import SingleDevice, Technique, describe, load_weights
from kexue.strategies.swap import exchange, exchange_state


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_twice_restores_every_byte(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kexue.strategies.swap.PIECE", 3)
    first = [torch.randn(4, 5).to(dtype), torch.randn(2, 3, 4).to(dtype).transpose(0, 2), torch.randn(()).to(dtype)]
    second = [torch.full_like(t, float("nan")) for t in first]
    second[0][0, :2] = torch.tensor([-0.0, float("inf")])
    places = [t.data_ptr() for t in first + second]
    before = [as_bytes(t) for t in first], [as_bytes(t) for t in second]
    exchange(first, second)
    assert ([as_bytes(t) for t in second], [as_bytes(t) for t in first]) == before
    exchange(first, second)
    assert ([as_bytes(t) for t in first], [as_bytes(t) for t in second]) == before
    assert [t.data_ptr() for t in first + second] == places


def test_views_see_the_exchange() -> None:
    flat = torch.zeros(6)
    part = flat[2:5]
    exchange([part], [torch.ones(3)])
    assert flat.tolist() == [0, 0, 1, 1, 1, 0]


def test_dtypes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16 and torch\.float32"):
        exchange([torch.zeros(1, dtype=torch.bfloat16)], [torch.zeros(1)])


def test_state_is_exchanged_where_there_is_some() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([first, second], lr=0.1)
    optimizer.state[first]["other"] = torch.full((2,), 5.0)
    exchange_state(optimizer, "other")
    assert first.tolist() == [5.0, 5.0]
    assert second.tolist() == [1.0, 1.0]
    assert optimizer.state[first]["other"].tolist() == [0.0, 0.0]


class Doubled(Technique):
    """Evaluates twice the weights that train: the least that uses the touch point."""

    def __init__(self) -> None:
        self._factor = 2.0
        self._calls: list[str] = []

    @property
    def evaluates(self) -> str | None:
        return "doubled weights"

    def exchange(self, module: pl.LightningModule) -> None:
        self._calls.append("double" if self._factor > 1 else "halve")
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(self._factor)
        self._factor = 1 / self._factor


class Watched(MODULES["plain"]):  # type: ignore[misc, name-defined]
    """Notes the size of its weights in each step; fails in the validation of its choice."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(optimizer="sgd", lr=0.0)
        self.fail_at, self.validations = fail_at, 0
        self.sizes: dict[str, list[float]] = {"train": [], "val": [], "test": [], "save": []}

    def size(self) -> float:
        return sum(p.detach().abs().sum().item() for p in self.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.sizes["train"].append(self.size())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.sizes["val"].append(self.size())
        self.validations += 1
        if self.validations == self.fail_at:
            raise RuntimeError("in the middle of a validation")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.sizes["test"].append(self.size())


def trainer_with(strategy: Any, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        **({"max_epochs": 2, "enable_checkpointing": False} | quiet | kwargs),  # type: ignore[arg-type]
    )


class Saver(pl.Callback):
    """Saves in the middle of an epoch, in the middle of a validation, and when something fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: pl.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validation")

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, "exception")


def test_validations_checkpoints_and_the_end_hold_the_weights_to_evaluate(tmp_path: Path) -> None:
    model = Watched()
    size = model.size()
    technique = Doubled()
    trainer = trainer_with(SingleDevice([technique]), callbacks=[Saver(tmp_path)], num_sanity_val_steps=1)
    trainer.fit(model, loader(0, 1, 8, 4), loader(0, 1, 8, 4))
    assert model.sizes["train"] == pytest.approx([size] * 4)
    assert model.sizes["val"] == pytest.approx([2 * size] * 5)
    assert model.size() == pytest.approx(2 * size)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("batch", "validation", "after"):
        weights = load_weights(tmp_path / f"{name}.ckpt")
        assert sum(w.abs().sum().item() for w in weights.values()) == pytest.approx(2 * size)
        assert describe(tmp_path / f"{name}.ckpt")["evaluates"] == "Doubled"
    trainer.test(model, loader(0, 1, 4, 4), verbose=False)
    assert model.sizes["test"] == pytest.approx([2 * size])
    # Sanity check, then two epochs of two saves and a validation, then the end: always in pairs but for the last.
    assert technique._calls == ["double", "halve"] * 7 + ["double"]


@pytest.mark.parametrize("name", ["batch", "validation", "after"])
def test_a_run_goes_on_from_the_weights_that_train(name: str, tmp_path: Path) -> None:
    model = Watched()
    size = model.size()
    trainer = trainer_with(SingleDevice([Doubled()]), callbacks=[Saver(tmp_path)], max_epochs=1)
    trainer.fit(model, loader(0, 1, 8, 4), loader(0, 1, 8, 4))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    resumed, technique = Watched(), Doubled()
    technique._factor = 0.5  # as if its second set had been read with the optimiser
    trainer = trainer_with(SingleDevice([technique]))
    trainer.fit(resumed, loader(0, 1, 8, 4), loader(0, 1, 8, 4), ckpt_path=tmp_path / f"{name}.ckpt")
    assert resumed.sizes["train"] == pytest.approx([size] * 2)
    assert resumed.sizes["val"][-1] == pytest.approx(2 * size)


def test_after_an_error_in_a_validation_a_checkpoint_still_holds_both(tmp_path: Path) -> None:
    model = Watched(fail_at=3)
    size = model.size()
    trainer = trainer_with(SingleDevice([Doubled()]), callbacks=[Saver(tmp_path)], num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.fit(model, loader(0, 1, 8, 4), loader(0, 1, 8, 4))
    weights = load_weights(tmp_path / "exception.ckpt")
    assert sum(w.abs().sum().item() for w in weights.values()) == pytest.approx(2 * size)


def test_a_technique_that_went_is_named(tmp_path: Path) -> None:
    path = tmp_path / "with.ckpt"
    model = Watched()
    trainer = trainer_with(SingleDevice([Doubled()]), max_epochs=1)
    trainer.fit(model, loader(0, 1, 8, 4))
    trainer.save_checkpoint(path)
    message = "saved with techniques Doubled, now none: .* goes on from the weights that Doubled evaluated"
    resumed = Watched()
    with pytest.warns(UserWarning, match=message):
        trainer_with(SingleDevice()).fit(resumed, loader(0, 1, 8, 4), ckpt_path=path)
    assert resumed.sizes["train"] == pytest.approx([model.size()] * 2)


def test_two_sets_of_weights_to_evaluate_are_refused() -> None:
    class Tripled(Doubled):
        pass

    with pytest.raises(InputError, match="Doubled and Tripled each bring weights to evaluate, choose one"):
        SingleDevice([Doubled(), Tripled()])
