"""What a checkpoint knows of its data, and what happens when the data are others."""

import logging
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn

from kexue.data.base import HostList
from kexue.data.digits import DigitsDataModule
from kexue.data.events import EventDataModule
from kexue.errors import InputError


def events(**options) -> EventDataModule:
    data = EventDataModule(num_generated=50, **options)
    data.setup("fit")
    return data


def test_state_is_plain_and_fits_the_same_data(tmp_path) -> None:
    state = events().state_dict()
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded == state
    assert state["order"] == {"rows": 50}
    again = events()
    again.load_state_dict(loaded)
    assert again.state_dict() == state


def test_other_vocabulary_or_labels_stop_it() -> None:
    state = events().state_dict()
    with pytest.raises(
        InputError, match=r"trained with other data: vocabulary is .* here and .* there; use the assets"
    ):
        events(min_count=5).load_state_dict(state)
    other = events()
    other.labels = other.labels[:-1]
    with pytest.raises(InputError, match="labels has 48 entries here and 49 there"):
        other.load_state_dict(state)
    other.labels = [*events().labels[:-1], ["A", "b"]]
    with pytest.raises(InputError, match=r"labels entry 48 is \['A', 'b'\] here and"):
        other.load_state_dict(state)


class FakeTrainer:
    is_last_batch = False
    training = True
    overfit_batches = 0.0


def test_other_rows_in_the_middle_of_an_epoch_are_warned_of(caplog) -> None:
    data: Any = events()
    data.trainer = FakeTrainer()
    state = data.state_dict()
    assert state["mid_epoch"]
    other: Any = events()
    other.set_records("train", other.records("train")[:40])
    other.trainer = FakeTrainer()
    dealt_anew: Any = events(batch_size=16, seed=1)  # the strategies go on with the rows that are left
    dealt_anew.trainer = FakeTrainer()
    with caplog.at_level(logging.WARNING, logger="kexue"):
        data.load_state_dict(state)
        other.load_state_dict({**state, "mid_epoch": False})
        dealt_anew.load_state_dict(state)
        assert not caplog.records
        other.load_state_dict(state)
    assert "middle of an epoch with rows 50 -> 40: some of its rows" in caplog.text


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.layer(batch["mask"].float().mean()[None]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_checkpoints_carry_it(tmp_path) -> None:
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, **quiet)
    trainer.fit(Tiny(), datamodule=events())
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["EventDataModule"]
    assert state["mid_epoch"]
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, **quiet)
    with pytest.raises(InputError, match="trained with other data: vocabulary"):
        trainer.fit(Tiny(), datamodule=events(min_count=5), ckpt_path=path)
    assert trainer.state.fn == TrainerFn.FITTING


def test_data_without_files_say_so(tmp_path) -> None:
    data = DigitsDataModule()
    with pytest.raises(InputError, match="DigitsDataModule reads no input files"):
        data.read_inputs(tmp_path / "x.json")
    with pytest.raises(InputError, match="DigitsDataModule has no answer format"):
        data.write_answers([], tmp_path / "x.json")


def test_overfitting_keeps_the_order() -> None:
    data: Any = DigitsDataModule(batch_size=100)
    data.trainer = FakeTrainer()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    shuffled = next(iter(loader))["digit"]
    data.trainer.overfit_batches = 2.0
    loader = data.train_dataloader()
    first = next(iter(loader))["digit"]
    loader.sampler.set_epoch(1)
    assert torch.equal(next(iter(loader))["digit"], first)
    assert not torch.equal(first, shuffled)


def test_host_list() -> None:
    items = HostList(iter([1, 2]))
    assert (len(items), items[1], list(items), items == [1, 2], items == HostList([1])) == (2, 2, [1, 2], True, False)
    assert repr(items) == "HostList([1, 2])"
