"""Pictures, the table of predictions, alerts and where a run comes from: without a trainer, and in a short run."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.demos.boring_classes import BoringModel
from ranks import run_ranks
from torch.utils.data import DataLoader

from kexue.callbacks import Alerts, CSVMetrics, Pictures, PredictionTable, StopOnNonFinite, tensorboard_logger
from kexue.callbacks.pictures import as_grid
from kexue.callbacks.prediction_table import record_row
from kexue.callbacks.provenance import data_state, file_state, git_state
from kexue.data.base import HostList
from kexue.data.records import Argument, Event, EventRecord, Span, SpanRecord
from kexue.errors import InputError


class Told(CSVMetrics):
    """Keeps the alerts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.alerts: list[str] = []

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append(f"{level} {title}: {text}")


class Parity(pl.LightningModule):
    """Calls 3 even; its loss is what the batch says."""

    def __init__(self, records: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.records = records

    def training_step(self, batch, batch_idx):
        return (self.layer.weight.sum() + self.layer.bias.sum()) * 0 + batch["loss"].max()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        number = batch["number"]
        return None if self.records else {"prediction": torch.where(number == 3, 0, number % 2), "target": number % 2}

    def predict_step(self, batch, batch_idx):
        return [EventRecord(r.id, r.text, r.events if r.id != "1" else ()) for r in batch["records"]]

    def pictures(self) -> dict[str, Any]:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2, 1))
        figure.add_subplot().plot([1, 2])
        return {"val/curve": figure, "val/samples": torch.rand(3, 1, 4, 4)}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def record(number: int) -> EventRecord:
    return EventRecord(str(number), f"text {number}", (Event("win", (Argument("winner", "me", 0),)),))


def collate(numbers: list[float]) -> dict[str, Any]:
    number = torch.tensor([int(n) if math.isfinite(n) else 0 for n in numbers])
    images = (number.float() / 10)[:, None, None, None].expand(-1, 1, 4, 4)
    records = HostList(record(int(n)) for n in number)
    return {"number": number, "image": images, "loss": torch.tensor(numbers), "records": records}


def trainer_of(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip


def loader(numbers: list[float], batch_size: int = 2) -> DataLoader:
    return DataLoader(numbers, batch_size=batch_size, collate_fn=collate)  # type: ignore[arg-type]


def table(folder: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    counts, *rows = [json.loads(line) for line in (folder / "predictions" / "test.jsonl").read_text().splitlines()]
    return counts, rows


def test_images_are_laid_out_side_by_side() -> None:
    grid = as_grid(torch.stack([torch.zeros(1, 2, 3), torch.ones(1, 2, 3), torch.full((1, 2, 3), 0.5)]))
    assert grid.shape == (5, 7, 3)
    assert (grid[:2, :3] == 0).all()
    assert (grid[:2, 4:] == 255).all()
    assert (grid[3:, :3] == 128).all()
    assert as_grid(torch.rand(3, 4, 4)).shape == as_grid(torch.rand(4, 4)).shape == (4, 4, 3)
    with pytest.raises(InputError, match="use \\(H, W\\)"):
        as_grid(torch.rand(2, 5, 4, 4))


def test_pictures_of_a_module_reach_the_folder_and_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = trainer_of(tmp_path, Pictures(), logger=tensorboard_logger(tmp_path))
    trainer.fit(Parity(), loader([1.0, 2.0]), loader([1.0]))
    assert sorted(path.relative_to(tmp_path / "plots").as_posix() for path in tmp_path.rglob("plots/**/*.png")) == [
        "val/curve/step=00000000.png",
        "val/samples/step=00000000.png",
    ]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").glob("events*"))
    assert b"val/samples" in events
    with pytest.raises(InputError, match=r"has no pictures\(\)"):
        trainer_of(tmp_path, Pictures(), logger=False).fit(BoringModel())


def test_classes_with_their_images_errors_first(tmp_path: Path) -> None:
    trainer_of(tmp_path, PredictionTable(max_rows=4, class_names=["even", "odd"]), logger=False).test(
        Parity(), loader([float(n) for n in range(8)]), verbose=False
    )
    counts, rows = table(tmp_path)
    assert counts == {"wrong": 1, "right": 7}
    assert len(rows) == 4
    assert rows[0] == {"right": False, "input": {"image": "images/0000.png"}, "gold": "odd", "predicted": "even"}
    assert all(row["right"] for row in rows[1:])
    from PIL import Image

    assert (np.asarray(Image.open(tmp_path / "predictions" / "images" / "0000.png")) == round(0.3 * 255)).all()


def test_records_beside_what_was_found_in_them(tmp_path: Path) -> None:
    trainer_of(tmp_path, PredictionTable(num_batches=2), logger=False).test(
        Parity(records=True), loader([float(n) for n in range(8)]), verbose=False
    )
    counts, rows = table(tmp_path)
    assert counts == {"wrong": 1, "right": 3}  # batches 0 and 2 of four
    assert [row["input"] for row in rows] == ["text 1", "text 0", "text 4", "text 5"]
    assert rows[0]["gold"] == "win (winner (me))"
    assert rows[0]["predicted"] == ""


def test_the_order_of_findings_does_not_count() -> None:
    one, two = Event("a", (Argument("r", "x", 0),)), Event("b", (Argument("r", "y", 4),))
    gold = EventRecord("1", "x   y", (one, two))
    assert record_row(gold, EventRecord("1", "x   y", (two, one)))["right"]
    assert not record_row(gold, EventRecord("1", "x   y", (one,)))["right"]


def two_ranks(folder: str) -> None:
    trainer_of(Path(folder), PredictionTable(), strategy="ddp", devices=2, logger=False).test(
        Parity(), loader([float(n) for n in range(8)]), verbose=False
    )


def test_a_span_at_another_place_is_wrong_and_says_so() -> None:
    here, there, other = Span("name", "x", 0), Span("name", "x", 4), Span("name", "y", 2)
    gold = SpanRecord("1", "x y x", (here, other))
    assert record_row(gold, SpanRecord("1", "x y x", (other, here)))["right"]
    row = record_row(gold, SpanRecord("1", "x y x", (there, other)))
    assert not row["right"]
    assert "start=0" in row["gold"]
    assert "start=4" in row["predicted"]
    row = record_row(gold, SpanRecord("1", "x y x", (other,)))
    assert (row["gold"], row["predicted"]) == ("name (x); name (y)", "name (y)")


@pytest.mark.slow
def test_two_processes_give_one_table(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, str(tmp_path))
    counts, rows = table(tmp_path)
    assert counts == {"wrong": 1, "right": 7}
    assert len(rows) == 8


def test_an_alert_says_why_a_run_fails(tmp_path: Path) -> None:
    told = Told(tmp_path)
    trainer = trainer_of(tmp_path, Alerts(), StopOnNonFinite(), logger=told)
    with pytest.raises(InputError, match="not finite at step 2"):
        trainer.fit(Parity(), loader([1.0, 1.0, float("nan"), 1.0], 1))
    assert len(told.alerts) == 1
    assert told.alerts[0].startswith("ERROR the run failed: InputError: the loss is not finite at step 2")


def test_an_alert_that_cannot_be_sent_hides_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Mute(Told):
        def alert(self, title: str, text: str, level: str) -> None:
            raise ConnectionError("no way out")

    trainer = trainer_of(tmp_path, Alerts(), StopOnNonFinite(), logger=Mute(tmp_path))
    with pytest.raises(InputError, match="not finite at step 2"):
        trainer.fit(Parity(), loader([1.0, 1.0, float("nan"), 1.0], 1))
    assert "Mute could not send the alert: no way out" in caplog.text


def test_where_a_run_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert git_state(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    remote = ["remote", "add", "origin", "https://me:secret@host/x.git"]
    for words in (["init", "-q", "-b", "work"], remote, [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    file = tmp_path / "data.json"
    file.write_text("abc")
    subprocess.run(["git", "-C", str(tmp_path), "add", "data.json"], check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert len(state.pop("commit")) == 40
    assert state == {"branch": "work", "changed": 1, "remote": "https://host/x.git"}

    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_state(file) == {"file": str(file), "bytes": 3, "sha256": known}
    one = data_state([file, file, tmp_path / "gone"], {"train": 1})
    assert [entry["file"] for entry in one["files"]] == [str(file)]
    file.write_text("abd")
    assert data_state([file], {"train": 1})["sha256"] != one["sha256"]
    assert data_state([], {"train": 1}) == {"files": [], "sha256": None, "rows": {"train": 1}}
