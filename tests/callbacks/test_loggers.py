"""The CSV file over interruptions, and W&B without an account."""

import csv
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from kexue.callbacks import CSVMetrics, wandb_logger
from kexue.callbacks.wandb_start import has_wandb_key
from kexue.errors import InputError
from kexue.strategies import SingleDevice, describe


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def resumed(folder: Path, fn: str = "fit") -> CSVMetrics:
    """A logger of a later process, which has met its trainer."""
    logger = CSVMetrics(folder)
    logger._trainer = SimpleNamespace(state=SimpleNamespace(fn=fn))  # type: ignore[assignment]
    return logger


def test_one_row_a_step_and_columns_as_they_come(tmp_path: Path) -> None:
    logger = CSVMetrics(tmp_path)
    logger.log_metrics({"train/loss": 0.5, "epoch": 0}, step=9)
    logger.log_metrics({"speed": 3.0}, step=9)
    logger.log_metrics({"train/loss": 0.4, "epoch": 0}, step=19)
    logger.log_metrics({"val/loss": 0.7, "epoch": 0}, step=19)
    logger.log_metrics({"val/loss": 0.6, "epoch": 0}, step=19)  # another value: another row
    text = (tmp_path / "metrics.csv").read_text()  # nothing waits for finalize
    assert text == "step,train/loss,epoch,speed,val/loss\n9,0.5,0,3.0,\n19,0.4,0,,0.7\n19,,0,,0.6\n"
    logger.finalize("success")
    logger.log_metrics({"test/loss": 0.1}, step=20)
    assert (tmp_path / "metrics.csv").read_text().endswith("\n20,,,,,0.1\n")


def test_resume_writes_again_what_came_later_and_loses_nothing_else(tmp_path: Path) -> None:
    first = CSVMetrics(tmp_path)
    for step in (9, 19, 29, 39):
        first.log_metrics({"loss": step / 10}, step=step)  # killed: no finalize
    again = resumed(tmp_path)
    again.log_metrics({"loss": 0.0, "new": 1}, step=29)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("9", "0.9"), ("19", "1.9"), ("29", "0.0")]
    again.log_metrics({"loss": 0.1}, step=19)  # only the first log of a run looks back
    assert len(rows(tmp_path)) == 4


def test_a_validation_that_is_repeated_shares_the_row_of_its_step(tmp_path: Path) -> None:
    logger = CSVMetrics(tmp_path)
    logger.log_metrics({"train/loss": 0.4, "epoch": 0}, step=9)
    logger.finalize("finished")
    again = resumed(tmp_path)
    again.log_metrics({"val/loss": 0.7, "epoch": 0}, step=9)
    again.log_metrics({"train/loss": 0.3, "epoch": 1}, step=10)
    text = (tmp_path / "metrics.csv").read_text()
    assert text == "step,train/loss,epoch,val/loss\n9,0.4,0,0.7\n10,0.3,1,\n"


def test_evaluating_later_takes_nothing_away(tmp_path: Path) -> None:
    CSVMetrics(tmp_path).log_metrics({"loss": 1.0}, step=9)
    resumed(tmp_path, "test").log_metrics({"test/loss": 2.0}, step=0)
    assert [row["step"] for row in rows(tmp_path)] == ["9", "0"]


def test_a_row_cut_short_goes(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.")
    CSVMetrics(tmp_path).log_metrics({"loss": 0.25}, step=3)
    assert (tmp_path / "metrics.csv").read_text() == "step,loss\n1,0.5\n3,0.25\n"


class Tiny(pl.LightningModule):
    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("broken")
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(logger, folder: Path, epochs: int, resume=None, fail_at: int = -1, **options) -> pl.Trainer:
    data = DataLoader(torch.ones(4, 2), batch_size=1)
    trainer = pl.Trainer(
        max_epochs=epochs, logger=logger, log_every_n_steps=2, default_root_dir=folder, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(Tiny(fail_at), data, data, ckpt_path=resume, weights_only=True)
    return trainer


def test_in_a_trainer_that_fails_and_resumes(tmp_path: Path) -> None:
    trainer = fit(CSVMetrics(tmp_path), tmp_path, epochs=1)
    assert trainer.log_dir == str(tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="broken"):
        fit(CSVMetrics(tmp_path), tmp_path, epochs=3, resume=tmp_path / "a.ckpt", fail_at=11)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "3", "5", "7", "9"]
    fit(CSVMetrics(tmp_path), tmp_path, epochs=2, resume=tmp_path / "a.ckpt")
    assert [row["step"] for row in rows(tmp_path)] == ["1", "3", "5", "7"]
    assert all(row["train/loss"] for row in rows(tmp_path))
    assert [bool(row["val/loss"]) for row in rows(tmp_path)] == [False, True, False, True]


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_RUN_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


def test_a_key_is_found_without_asking(no_account: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_wandb_key()
    no_account.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    no_account.setenv("WANDB_API_KEY", "secret")
    assert has_wandb_key()


def mode(*args, **kwargs) -> str:
    return wandb_logger(*args, **kwargs)._wandb_init["mode"]


def test_offline_unless_there_is_a_key(no_account: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert mode(tmp_path) == "offline"
    no_account.setenv("WANDB_MODE", "online")
    assert mode(tmp_path) == "offline"  # online without a key would ask for one
    no_account.setenv("WANDB_MODE", "disabled")
    assert mode(tmp_path) == "disabled"
    no_account.delenv("WANDB_MODE")
    with pytest.raises(InputError, match="WANDB_API_KEY"):
        wandb_logger(tmp_path, offline=False)
    no_account.setenv("WANDB_API_KEY", "secret")
    assert mode(tmp_path) == mode(tmp_path, offline=False) == "online"
    assert mode(tmp_path, offline=True) == "offline"


def test_missing_package_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        wandb_logger(tmp_path)


def test_wandb_keeps_the_run_and_prints_nothing(no_account, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    logger = wandb_logger(tmp_path, name="tiny", tags=["a"])
    fit(logger, tmp_path, epochs=1)
    run = logger.experiment
    assert run.step == 2  # steps 1 and 3: what was logged at one step is one row
    assert run.id == (tmp_path / "wandb" / "run_id").read_text()
    assert run.name == "tiny"
    assert run.summary["trainer/global_step"] == 3
    assert run.summary["val/loss"] > 0
    logger.finalize("finished")  # a cluster's signal: closed at once, and later values are not an error
    logger.log_metrics({"late": 1.0}, step=4)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert wandb_logger(tmp_path)._wandb_init["id"] == run.id
    assert wandb_logger(tmp_path)._wandb_init["resume"] == "allow"
    assert "wandb" not in "".join(capfd.readouterr()).lower()


def test_the_run_is_found_again_by_its_checkpoint(no_account: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where `wandb/` was cleaned away; a run that branches off into another folder is a run of its own."""
    no_account.setenv("WANDB_MODE", "disabled")
    logger = wandb_logger(tmp_path)
    trainer = fit(logger, tmp_path, epochs=1, strategy=SingleDevice())
    path = tmp_path / "checkpoints" / "step=00000004.ckpt"
    trainer.save_checkpoint(path)
    kept = (tmp_path / "wandb" / "run_id").read_text()
    assert describe(path)["loggers"] == {"WandbRun": kept}
    shutil.rmtree(tmp_path / "wandb")
    assert wandb_logger(tmp_path)._wandb_init["id"] == kept
    assert wandb_logger(tmp_path / "branch")._wandb_init["id"] != kept


def test_an_array_job_is_a_group(no_account: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert wandb_logger(tmp_path)._wandb_init["group"] is None
    no_account.setenv("SLURM_ARRAY_JOB_ID", "77")
    assert wandb_logger(tmp_path, name="tiny")._wandb_init["group"] == "tiny-77"
    assert wandb_logger(tmp_path, group="mine")._wandb_init["group"] == "mine"
    with pytest.raises(InputError, match="watch_every=0"):
        wandb_logger(tmp_path, watch="all", watch_every=0)
