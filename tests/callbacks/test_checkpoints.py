"""The newest and the best checkpoint, whole, once, and found again after a resume."""

import errno
import os
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from ranks import run_ranks
from torch.utils.data import DataLoader

from kexue.callbacks import Checkpoints
from kexue.errors import InputError


class Scripted(pl.LightningModule):
    """A linear regression whose validation logs the values it is told to."""

    def __init__(self, values=(), key="val/score") -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.values = list(values)
        self.key = key

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Validated(Scripted):
    def validation_step(self, batch, batch_idx):
        self.log(self.key, self.values[self.current_epoch])


def loader() -> DataLoader:
    return DataLoader(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), batch_size=2)


def trainer(folder: Path, epochs: int, *callbacks: pl.Callback, **kwargs) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1}
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **quiet | kwargs
    )


def names(folder: Path) -> dict[str, str]:
    """Everything in a folder, with what a link names."""
    return {p.name: p.readlink().name if p.is_symlink() else "" for p in sorted(folder.iterdir())}


def fit(folder: Path, values, epochs: int, resume: str | None = None, mode="max", **kwargs):
    torch.manual_seed(0)
    model = Validated(values)
    options = {key: kwargs.pop(key) for key in ("every_n_epochs", "every_n_steps", "monitor") if key in kwargs}
    saver = Checkpoints(folder / "c", **{"monitor": "val/score", "mode": mode} | options)
    trainer(folder, epochs, saver, **kwargs).fit(model, loader(), loader(), ckpt_path=resume, weights_only=True)
    return saver, model


def test_keeps_last_and_best(tmp_path: Path) -> None:
    saver, _ = fit(tmp_path, [0.1, 0.9, 0.5], epochs=3)
    assert names(tmp_path / "c") == {
        "best.ckpt": "step=00000008.ckpt",
        "last.ckpt": "step=00000012.ckpt",
        "step=00000008.ckpt": "",
        "step=00000012.ckpt": "",
    }
    assert saver.best_model_path.endswith("step=00000008.ckpt")
    assert saver.last_model_path.endswith("step=00000012.ckpt")
    assert saver.best_value == pytest.approx(0.9)
    assert torch.load(tmp_path / "c" / "best.ckpt", weights_only=True)["global_step"] == 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_never_best(tmp_path: Path, bad: float) -> None:
    saver, _ = fit(tmp_path, [bad, 0.2, bad], epochs=3)
    assert saver.best_value == pytest.approx(0.2)
    assert names(tmp_path / "c")["best.ckpt"] == "step=00000008.ckpt"


def test_missing_monitor_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"monitor='val/f1'.*val/score.*monitor=null"):
        fit(tmp_path, [0.1], epochs=1, monitor="val/f1")


def test_without_validation(tmp_path: Path) -> None:
    saver = Checkpoints(tmp_path / "c")
    trainer(tmp_path, 2, saver).fit(Scripted(), loader())
    links = {"best.ckpt": "step=00000008.ckpt", "last.ckpt": "step=00000008.ckpt", "step=00000008.ckpt": ""}
    assert names(tmp_path / "c") == links
    watched = Checkpoints(tmp_path / "d", monitor="train/loss")
    trainer(tmp_path, 2, watched).fit(Scripted(), loader())
    assert watched.best_value is not None
    assert watched.best_value > 0


def test_resume_knows_the_best_and_ends_equal(tmp_path: Path) -> None:
    values = [0.9, 0.1, 0.5, 0.6]
    _, whole = fit(tmp_path / "whole", values, epochs=4)
    fit(tmp_path / "parts", values, epochs=2)
    saver, resumed = fit(tmp_path / "parts", values, epochs=4, resume=str(tmp_path / "parts" / "c" / "last.ckpt"))
    assert saver.best_value == pytest.approx(0.9)
    assert names(tmp_path / "parts" / "c") == names(tmp_path / "whole" / "c")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"every_n_epochs": 3}, {"monitor": None, "every_n_epochs": 5}])
def test_resume_from_the_save_at_the_end_of_training(tmp_path: Path, options: dict) -> None:
    _, whole = fit(tmp_path / "whole", [0.1] * 4, epochs=4, **options)
    fit(tmp_path / "parts", [0.1] * 4, epochs=2, **options)
    last = tmp_path / "parts" / "c" / "last.ckpt"
    assert last.readlink().name == "step=00000008.ckpt"
    _, resumed = fit(tmp_path / "parts", [0.1] * 4, epochs=4, resume=str(last), **options)
    assert last.readlink().name == "step=00000016.ckpt"
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_another_folder_forgets_a_best_that_is_not_there(tmp_path: Path) -> None:
    fit(tmp_path / "old", [0.9, 0.1], epochs=2)
    saver, _ = fit(tmp_path / "new", [0.9, 0.1, 0.5], epochs=3, resume=str(tmp_path / "old" / "c" / "last.ckpt"))
    assert saver.best_value == pytest.approx(0.5)
    assert names(tmp_path / "new" / "c")["best.ckpt"] == "step=00000012.ckpt"


class Recorder(Checkpoints):
    """Notes at which steps something was saved."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[int] = []

    def _save(self, trainer, value) -> None:
        before = self._last
        super()._save(trainer, value)
        if self._last != before:
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [3, 4, 6, 8]),
        ({"val_check_interval": 2}, [2, 3, 4, 6, 8]),
        ({"accumulate_grad_batches": 2}, [2, 3, 4]),
        ({"max_steps": 5}, [3, 4, 5]),
        ({"limit_val_batches": 0}, [3, 4, 6, 8]),
        ({"check_val_every_n_epoch": 2}, [3, 4, 6, 8]),
    ],
)
def test_saves_each_step_once(tmp_path: Path, options: dict, steps: list[int]) -> None:
    saver = Recorder(tmp_path / "c", monitor=None if "limit_val_batches" in options else "val/score", every_n_steps=3)
    trainer(tmp_path, 2, saver, **options).fit(Validated([0.5, 0.4]), loader(), loader())
    assert saver.steps == steps


def test_a_callback_may_serve_a_second_run(tmp_path: Path) -> None:
    saver = Recorder(tmp_path / "c", monitor="val/score", mode="max")
    for values in ([0.9, 0.1], [0.2, 0.3]):
        trainer(tmp_path, 2, saver).fit(Validated(values), loader(), loader())
    assert saver.steps == [4, 8, 4, 8]
    assert saver.best_value == pytest.approx(0.3)


def disagreeing_rank(folder: str) -> tuple[str, float | None]:
    """One of two processes that measure different values."""
    rank = int(os.environ["RANK"])
    saver = Checkpoints(Path(folder) / "c", monitor="val/score", mode="max")
    values = [[0.1, 0.9, 0.2], [0.8, 0.2, 0.9]][rank]
    trainer(Path(folder), 3, saver, strategy="ddp", devices=2).fit(Validated(values), loader(), loader())
    return saver.best_model_path, saver.best_value


def test_processes_agree(tmp_path: Path) -> None:
    first, second = run_ranks(disagreeing_rank, 2, str(tmp_path))
    assert first == second == (str(tmp_path / "c" / "step=00000004.ckpt"), pytest.approx(0.9))
    assert set(names(tmp_path / "c")) == {"best.ckpt", "last.ckpt", "step=00000004.ckpt", "step=00000006.ckpt"}


def test_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(checkpoint, path, **kwargs):
        Path(path).with_name(f".{Path(path).name}.partial").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    fit(tmp_path, [0.1, 0.2], epochs=1)
    before = names(tmp_path / "c")
    last = tmp_path / "c" / "last.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "save_checkpoint", lambda self, path, *a, **k: full(None, path))
        with pytest.raises(OSError, match="No space left"):
            fit(tmp_path, [0.1, 0.2], epochs=2, resume=str(last))
    assert {k: v for k, v in names(tmp_path / "c").items() if not k.startswith(".")} == before
    assert torch.load(last, weights_only=True)["global_step"] == 4
    (tmp_path / "c" / "last.ckpt.new").symlink_to("nowhere")
    fit(tmp_path, [0.1, 0.2], epochs=2, resume=str(last))
    assert set(names(tmp_path / "c")) == {"best.ckpt", "last.ckpt", "step=00000008.ckpt"}


def test_directories_and_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO's checkpoints are directories; files of other people's stay."""

    def save(self, path, *args, **kwargs):
        Path(path).mkdir(parents=True)
        (Path(path) / "part").write_text("x")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", save)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.ckpt").write_text("precious")
    fit(tmp_path, [0.1, 0.9, 0.5, 0.6], epochs=4)
    kept = {"best.ckpt", "last.ckpt", "mine.ckpt", "step=00000008.ckpt", "step=00000016.ckpt"}
    assert set(names(tmp_path / "c")) == kept
    assert (tmp_path / "c" / "last.ckpt" / "part").read_text() == "x"


@pytest.mark.parametrize("options", [{"mode": "up"}, {"every_n_epochs": 0}, {"every_n_steps": 0}])
def test_wrong_arguments(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Checkpoints("c", **options)
