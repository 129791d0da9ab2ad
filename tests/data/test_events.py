"""Event batches from files and from the generator, the assets of a run, and wrong settings."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from kexue.data.base import HostList
from kexue.data.duee import event_row
from kexue.data.events import EventDataModule
from kexue.data.generators.event_sentences import SCHEMA, event_sentences
from kexue.data.records import TRIGGER_ROLE, EventRecord
from kexue.errors import InputError


def write_root(folder: Path, num_train: int = 40, num_dev: int = 8) -> Path:
    """A small data set in DuEE's layout."""
    place = folder / "event_extraction_duee"
    place.mkdir(parents=True)
    stream = event_sentences(1)
    for name, number in (("duee_train.json", num_train), ("duee_dev.json", num_dev)):
        rows = [json.dumps(event_row(next(stream)), ensure_ascii=False) for _ in range(number)]
        (place / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    schema = [{"event_type": kind, "role_list": [{"role": role} for role in roles]} for kind, roles in SCHEMA.items()]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in schema)
    (place / "duee_event_schema.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(write_root(tmp_path / "data"))


def check_batch(batch: dict[str, Any], labels: list[list[str]]) -> None:
    """Decode every positive cell back to the text and compare it with the records."""
    mask, records = batch["mask"], batch["records"]
    assert batch["ids"].dtype == torch.long
    assert batch["ids"].shape == mask.shape == (len(records), max(len(record.text) for record in records) + 2)
    assert mask.sum(dim=1).tolist() == [len(record.text) + 2 for record in records]
    assert batch["num_tokens"] == mask.sum()
    assert (batch["ids"][~mask] == 0).all()
    for index, (record, offsets) in enumerate(zip(records, batch["offsets"], strict=True)):
        found = {
            (*labels[label], record.text[offsets[start][0] : offsets[end][1]], offsets[start][0])
            for label, start, end in batch["argument_labels"][index].tolist()
            if label >= 0
        }
        assert found == {(e.type, a.role, a.text, a.start) for e in record.events for a in e.arguments}
        for kind in ("head_labels", "tail_labels"):
            cells = [cell for cell in batch[kind][index].tolist() if cell != [-1, -1, -1]]
            assert all(label == 0 and 1 <= i <= j <= len(record.text) for label, i, j in cells)


@pytest.mark.parametrize("source", ["files", "generator"])
def test_batches_hold_the_gold_events(source: str, root: str) -> None:
    data = EventDataModule(7, root=root if source == "files" else None, num_generated=40)
    data.setup("fit")
    assert len(data.records("train")) == 40
    assert data.labels[:2] == [["司法-判刑", TRIGGER_ROLE], ["司法-判刑", "被告"]]
    assert data.model_arguments() == {"vocab_size": len(data.collator().tokenizer), "labels": data.labels}
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            check_batch(batch, data.labels)


def test_splits_of_generated_sentences_do_not_overlap() -> None:
    data = EventDataModule(num_generated=300)
    texts = [{record.text for record in data.records(split)} for split in ("train", "val", "test")]
    assert [len(part) for part in texts] == [300, 30, 30]
    assert len(set.union(*texts)) == 360


def test_batches_do_not_depend_on_workers(root: str) -> None:
    def epoch(num_workers: int) -> list[dict[str, Any]]:
        data = EventDataModule(8, root=root, num_workers=num_workers)
        data.setup("fit")
        return list(data.train_dataloader())

    for one, other in zip(epoch(0), epoch(2), strict=True):
        assert one["records"] == other["records"]
        assert torch.equal(one["ids"], other["ids"])
        assert torch.equal(one["argument_labels"], other["argument_labels"])


def test_a_batch_without_events_keeps_its_shape() -> None:
    data = EventDataModule(num_generated=10)
    data.prepare()
    batch = data.collator()([EventRecord("a", "无事"), EventRecord("b", "无")])
    assert batch["argument_labels"].tolist() == batch["head_labels"].tolist() == [[[-1, -1, -1]]] * 2


def test_assets_stand_in_for_the_training_data(root: str, tmp_path: Path) -> None:
    data = EventDataModule(root=root, lowercase=True)
    data.prepare()
    data.save_assets(tmp_path / "assets")
    for name in ("duee_train.json", "duee_event_schema.json"):
        Path(root, "event_extraction_duee", name).unlink()
    again = EventDataModule(root=root)
    again.load_assets(tmp_path / "assets")
    again.setup("test")
    assert again.model_arguments() == data.model_arguments()
    assert again.fingerprint() == data.fingerprint()
    check_batch(next(iter(again.test_dataloader())), again.labels)
    with pytest.raises(InputError, match=r"labels\.json: no such file"):
        again.load_assets(tmp_path)
    (tmp_path / "labels.json").write_text('{"a": 1}', encoding="utf-8")
    with pytest.raises(InputError, match=r"labels\.json: not a list of"):
        again.load_assets(tmp_path)


def test_texts_are_read_and_answers_written(tmp_path: Path) -> None:
    data = EventDataModule(4, num_generated=10, max_length=5)
    path = tmp_path / "in.json"
    path.write_text('{"id": "x", "text": "' + "长" * 900 + '"}\n{"id": "y", "text": "短"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="nothing to predict on; give input=FILE"):
        data.setup("predict")
    data.read_inputs(path)
    data.setup("predict")
    records = [record for batch in data.predict_dataloader() for record in batch["records"]]
    assert [(record.id, len(record.text)) for record in records] == [("x", 900), ("y", 1)]
    # Batches are sorted by length; answers come in the order of the inputs.
    assert data.write_answers(list(reversed(records)), tmp_path / "out.json") == 2
    answers = (tmp_path / "out.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in answers] == [record.id for record in data.records("predict")]
    first = json.loads((tmp_path / "out.json").read_text(encoding="utf-8").splitlines()[0])
    assert first == {"id": "x", "event_list": []}


def test_long_training_rows_are_bad_rows_and_others_stay(root: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"duee_train\.json:\d+: text of \d+ characters, at most 30 are read; raise"):
        EventDataModule(root=root, max_length=32).prepare()
    listing = tmp_path / "run" / "bad_rows.jsonl"
    data = EventDataModule(root=root, max_length=32, on_bad_row="skip", bad_rows_file=str(listing))
    data.setup("fit")
    assert max(len(record.text) for record in data.records("train")) <= 30
    assert len(data.records("train")) + len(listing.read_text(encoding="utf-8").splitlines()) == 40
    assert len(data.records("val")) == 8


def test_windows_hold_the_arguments_that_lie_in_them(caplog: pytest.LogCaptureFixture) -> None:
    data = EventDataModule(7, num_generated=40, max_length=12, stride=9)
    data.setup("fit")
    several = 0
    for batch in data.train_dataloader():
        several += len(batch["owners"]) > len(batch["records"])
        assert batch["ids"].shape[1] <= 12
        seen: list[set[int]] = [set() for _ in batch["records"]]
        rows = zip(batch["owners"], batch["offsets"], batch["argument_labels"].tolist(), strict=True)
        for row, (owner, offsets, cells) in enumerate(rows):
            record, start, end = batch["records"][owner], offsets[1][0], offsets[-2][1]
            assert batch["mask"][row].sum() == end - start + 2
            seen[owner] |= set(range(start, end))
            found = {(*data.labels[label], offsets[a][0], offsets[b][1]) for label, a, b in cells if label >= 0}
            inside = {(e.type, a.role, a.start, a.end) for e in record.events for a in e.arguments}
            assert found == {item for item in inside if start <= item[2] and item[3] <= end}
        assert seen == [set(range(len(record.text))) for record in batch["records"]]
    assert several
    cut = [argument for _, arguments in data.cut_by_windows("train") for argument in arguments]
    assert cut
    assert all(len(argument.text) > 2 for argument in cut)  # 10 characters, 9 apart
    assert f"{len(cut)} training arguments cut by windows, the first: " in caplog.text


def test_windows_take_long_rows_and_refuse_books(root: str, tmp_path: Path) -> None:
    data = EventDataModule(root=root, max_length=32, stride=20)
    data.prepare()
    assert max(len(record.text) for record in data.records("train")) > 30
    path = tmp_path / "in.json"
    rows = [{"id": "x", "text": "长" * 1_000_000}, {"id": "y", "text": "短"}]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(InputError, match=r"in\.json:1: text of 1000000 characters, at most 100000 are read"):
        data.read_inputs(path)
    skipping = EventDataModule(root=root, on_bad_row="skip", bad_rows_file=str(tmp_path / "bad.jsonl"))
    skipping.read_inputs(path)
    assert [record.id for record in skipping.records("predict")] == ["y"]
    assert "text of 1000000 characters" in (tmp_path / "bad.jsonl").read_text("utf-8")


def test_wrong_places_and_values_are_named(root: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root=.*nowhere: no such folder; .*data\.root=null"):
        EventDataModule(root=str(tmp_path / "nowhere")).prepare()
    with pytest.raises(InputError, match=r"event_extraction_duee/duee_trai\.json: no such file; did you mean"):
        EventDataModule(root=root, train_file="event_extraction_duee/duee_trai.json").prepare()
    with pytest.raises(InputError, match=r"vocab\.txt: no such file"):
        EventDataModule(root=root, vocab_file=str(tmp_path / "vocab.txt")).prepare()
    wrong_values: list[dict[str, Any]] = [
        {"batch_size": 0},
        {"eval_batch_size": -1},
        {"max_length": 2},
        {"num_generated": 1},
        {"on_bad_row": "keep"},
    ]
    for wrong in wrong_values:
        with pytest.raises(InputError, match=rf"data\.{next(iter(wrong))}="):
            EventDataModule(**wrong)
    with pytest.raises(InputError, match=r"data\.stride: windows\(size=8, stride=9\)"):
        EventDataModule(max_length=10, stride=9)


class Walker(pl.LightningModule):
    """Looks at batches as a model would."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        assert isinstance(batch["records"], HostList)
        assert isinstance(batch["records"][0], EventRecord)
        return self.layer(batch["mask"].float().mean()[None]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_takes_the_batches_as_they_are(precision: Any) -> None:
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    trainer = pl.Trainer(accelerator="cpu", precision=precision, max_epochs=1, **quiet)
    trainer.fit(Walker(), datamodule=EventDataModule(16, num_generated=32))
    assert trainer.global_step == 2


def test_real_data_pass() -> None:
    place = os.environ.get("KEXUE_DATA")
    if not place or not Path(place, "event_extraction_duee").is_dir():
        pytest.skip("needs real data: set KEXUE_DATA")
    data = EventDataModule(32, root=place)
    data.setup("fit")
    assert (len(data.records("train")), len(data.records("val")), len(data.labels)) == (892, 150, 282)
    tokens = cells = 0
    for batch in data.train_dataloader():
        check_batch(batch, data.labels)
        tokens, cells = tokens + batch["num_tokens"], cells + batch["ids"].numel()
    assert tokens == sum(len(record.text) + 2 for record in data.records("train"))
    assert tokens / cells > 0.85
