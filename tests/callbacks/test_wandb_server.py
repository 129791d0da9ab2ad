"""The real W&B client against a server on loopback: online, resumed by id, offline and sent later, and in a sweep."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from wandb_server import KEY, WandbServer

from kexue.callbacks import log_picture, wandb_logger
from kexue.wandb_records import read_records, record_files

STEP = "trainer/global_step"
GROUP = ("SLURM_ARRAY_JOB_ID", "WANDB_RUN_ID")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    import wandb

    wandb.teardown()  # a process of W&B that an earlier test started has the earlier environment
    for name in [name for name in os.environ if name.startswith("WANDB_") or name in GROUP]:
        monkeypatch.delenv(name)
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
        wandb.teardown()


def checkpoints(folder: Path) -> SimpleNamespace:
    """What `Checkpoints` tells a logger: a file that is the best, a directory as ZeRO writes it that is the last."""
    best, last = folder / "step=00000002.ckpt", folder / "step=00000004.ckpt"
    last.mkdir(parents=True)
    torch.save({"state_dict": {}}, best)
    (last / "part.pt").write_bytes(b"part")
    (last / "kexue.json").write_text(json.dumps({"step": 4, "stage": 2, "world_size": 2}))
    return SimpleNamespace(best_model_path=str(best), last_model_path=str(last), best_value=0.5, monitor="val/loss")


def test_online_then_resumed_by_its_id(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    options = {"name": "tiny", "job_type": "train", "tags": ["a"], "log_model": "last"}
    logger = wandb_logger(tmp_path, **options)
    logger.log_config({"model": {"dim": 3}, "api_key": "hush", "text": f"with {KEY}"})
    logger.log_hyperparams({"dim": 3})
    for step in range(3):
        logger.log_metrics({"train/loss": float(step)}, step)
    trainer = SimpleNamespace(
        is_global_zero=True, default_root_dir=tmp_path, loggers=[logger],
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=2)),
    )  # fmt: skip
    log_picture(trainer, "val/samples", torch.rand(5, 1, 4, 4))  # type: ignore[arg-type]
    logger.log_table("test/predictions", columns=["gold", "predicted"], data=[["a", "b"]], step=2)
    logger.after_save_checkpoint(checkpoints(tmp_path / "checkpoints"))
    logger.finalize("success")
    logger.alert("the loss is not finite", f"key {KEY}")
    logger.mark_preempting()
    name = (tmp_path / "wandb" / "run_id").read_text()

    shutil.rmtree(tmp_path / "wandb")  # cleaned away: the id is in the checkpoint as well
    manifest = tmp_path / "checkpoints" / "step=00000004.ckpt" / "kexue.json"
    manifest.write_text(json.dumps({"step": 4, "loggers": {"WandbRun": name}}))
    again = wandb_logger(tmp_path, **options)
    for step in range(3, 5):
        again.log_metrics({"train/loss": float(step)}, step)
    again.mark_preempting()

    assert list(server.runs) == [name]
    run = server.runs[name]
    assert (run["displayName"], run["groupName"], run["jobType"], run["tags"]) == ("tiny", "tiny-77", "train", ["a"])
    rows = server.history(name)
    assert [(row[STEP], row["train/loss"]) for row in rows] == [(step, float(step)) for step in range(5)]
    assert [row["_step"] for row in rows] == list(range(5))
    assert {"val/samples", "test/predictions"} <= rows[2].keys()
    assert server.config(name) == {"model": {"dim": 3}, "api_key": "(hidden)", "text": "(hidden)"}
    models = [artifact for artifact in server.artifacts.values() if artifact["artifactTypeName"] == "model"]
    # W&B gives `latest` to whatever comes; the one that is meant comes last.
    assert [{alias["alias"] for alias in model["aliases"]} for model in models] == [{"best", "latest"}, {"latest"}]
    assert all(model["state"] == "COMMITTED" for model in models)
    assert json.loads(models[-1]["metadata"])["world_size"] == 2
    uploads = {path.split("/", 4)[-1] for path in server.files if path.startswith("/storage/artifact/")}
    assert {"step=00000002.ckpt", "step=00000004.ckpt/part.pt", "step=00000004.ckpt/kexue.json"} <= uploads
    assert [alert["title"] for alert in server.alerts][:2] == ["the loss is not finite", "preempted"]
    assert KEY not in server.everything()
    assert "hush" not in server.everything()


def test_no_server_means_offline_and_the_run_is_sent_later(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    for part in (range(3), range(3, 5)):  # interrupted once
        logger = wandb_logger(tmp_path, settings={"init_timeout": 3})
        for step in part:
            logger.log_metrics({"train/loss": float(step)}, step)
        logger.mark_preempting()
    assert caplog.text.count("no connection to W&B (") == 2
    files = [file for file in record_files(tmp_path) if file.parent.name.startswith("offline-run-")]
    assert len(files) == 2
    command = [sys.executable, "-m", "wandb", "sync", *(str(file.parent) for file in files)]
    environment = {**os.environ, **server.environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (name,) = server.runs
    assert name == (tmp_path / "wandb" / "run_id").read_text()
    assert [row[STEP] for row in server.history(name)] == list(range(5))


@pytest.mark.slow
def test_a_sweep_of_the_command_line(server: WandbServer, tmp_path: Path) -> None:
    """W&B's own agent starts `kexue fit` with values of its choice; each run gets the id that the agent gave it."""
    import wandb

    common = ["debug=fast", "logger=wandb", "trainer.accelerator=cpu", "trainer.enable_model_summary=false"]
    command = [sys.executable, "-m", "kexue.cli", "fit", *common, "${args_no_hyphens}"]
    values = {"model.optimizer.lr": {"values": [0.1, 0.01]}}
    config = {"method": "grid", "program": "kexue", "command": command, "parameters": values}
    sweep = wandb.sweep(config, project="p")
    server.offers = [{"model.optimizer.lr": 0.1}, {"model.optimizer.lr": 0.01}]
    agent = [sys.executable, "-m", "wandb", "agent", "--count", "2", f"me/p/{sweep}"]
    done = subprocess.run(agent, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(server.runs) == ["sweeprun1", "sweeprun2"], done.stdout + done.stderr
    rates = [server.config(name)["model"]["optimizer"]["lr"] for name in sorted(server.runs)]
    assert rates == [0.1, 0.01]
    assert all(any("test/loss" in row for row in server.history(name)) for name in server.runs)
    configs = [yaml.safe_load(path.read_text()) for path in tmp_path.glob("runs/*/*/config.yaml")]
    assert sorted(config["model"]["optimizer"]["lr"] for config in configs) == [0.01, 0.1]


def test_gradients_are_watched_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.demos.boring_classes import BoringModel

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = wandb_logger(tmp_path, watch="gradients", watch_every=1)

    class Preempted(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if batch_idx == 3:
                logger.mark_preempting()

    trainer = pl.Trainer(
        max_steps=6, logger=logger, log_every_n_steps=1, accelerator="cpu", default_root_dir=tmp_path,
        callbacks=[Preempted()], enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(BoringModel())
    records = [record for file in record_files(tmp_path) for record in read_records(file)]
    keys = {key for record in records if record["type"] == "history" for key in record["history"]["item"]}
    assert any(key.startswith("gradients/") for key in keys), keys
