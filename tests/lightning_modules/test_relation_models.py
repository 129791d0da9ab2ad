"""Both models of relations: they learn, resume, predict characters, train on two processes, lose nothing of gold."""

import functools
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from cells import RANK, WORLD, full_weights, make_strategy
from ranks import run_ranks

from kexue.data.records import VALUE_SLOT, RelationRecord
from kexue.data.relations import RelationDataModule
from kexue.errors import InputError
from kexue.lightning_modules.extraction import Lic2020Relation, RelationGPLinker
from kexue.lightning_modules.extraction.lic2020_relation import object_targets
from kexue.lightning_modules.extraction.relations import plain_relations, records_of, without_repeated
from kexue.nn.transformer import encode
from kexue.strategies import SingleDevice

TINY = {"dim": 32, "num_layers": 1, "num_heads": 2, "feedforward_dim": 64, "dropout": 0.0}
MODELS = {"gplinker_relation": RelationGPLinker, "lic2020_relation": Lic2020Relation}
both = pytest.mark.parametrize("name", MODELS)


def data(rows: int = 24, **options) -> RelationDataModule:
    module = RelationDataModule(**{"batch_size": 8, "num_generated": rows, **options})
    module.prepare()
    return module


def model(name: str, source: RelationDataModule, **options) -> Any:
    pl.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=3e-3)
    return MODELS[name](**source.model_arguments(), **{**TINY, **options}, optimizer=optimizer)


def trainer(folder: Path | str, **options) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return pl.Trainer(
        **{
            "default_root_dir": folder,
            "accelerator": "cpu",
            "devices": 1,
            "num_sanity_val_steps": 0,
            **quiet,
            **options,
        }
    )


@both
def test_loss_on_one_batch_falls(name: str) -> None:
    source = data(10)
    source.setup("fit")
    module = model(name, source)
    module.configure_model()
    module.log = lambda *_, **__: None
    batch, optimizer = next(iter(source.train_dataloader())), module.configure_optimizers()
    losses = []
    for _ in range(60):
        output = module.training_step(batch, 0)
        assert output["loss"].item() == pytest.approx(sum(loss.item() for loss in output["losses"].values()), rel=1e-5)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())


@both
def test_packed_rows_give_the_losses_of_padded_ones(name: str) -> None:
    found = []
    for source in (data(16, batch_size=16), data(16, batch_size=16, row_budget=128)):
        source.setup("fit")
        module = model(name, source, positions="learned")
        module.configure_model()
        batch = next(iter(source.train_dataloader()))
        torch.manual_seed(1)  # of the subjects that are drawn
        losses = module.task_losses(encode(module.encoder, batch), batch)
        found.append([loss.item() for loss in losses.values()])
    assert batch["starts"][:, 0].max() < 15, "no two sentences share a row"
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@both
def test_padding_and_other_sentences_change_nothing(name: str) -> None:
    source = data(24)
    source.setup("fit")
    module = model(name, source).eval()
    module.configure_model()
    records = sorted(source.records("train"), key=lambda record: len(record.text))[::6]
    losses = []
    for group in (records, records[:1]):
        batch = source.collator()(group)
        with torch.no_grad():
            hidden = encode(module.encoder, batch)
            if name == "gplinker_relation":
                losses.append(module.head(hidden, batch["mask"])["heads"].dense()[0, :, :9, :9])
            else:
                rows, spans = torch.tensor([0]), torch.tensor([[1, 3]])
                losses.append(torch.cat([part[0, :9].flatten() for part in module.head(hidden, rows, spans)]))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)


@both
def test_fit_logs_resumes_bit_for_bit_and_is_loaded(name: str, tmp_path: Path) -> None:
    source = data()
    whole = model(name, source, warmup_steps=2)
    runner = trainer(tmp_path, max_epochs=4, strategy=SingleDevice())
    runner.fit(whole, datamodule=source)
    assert {"val/f1", "val/precision", "val/recall", "val/loss", "train/loss"} <= set(runner.callback_metrics)
    assert not any(key.startswith("val/f1/") for key in runner.callback_metrics)

    first = trainer(tmp_path, max_epochs=2, strategy=SingleDevice())
    first.fit(model(name, source, warmup_steps=2), datamodule=source)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = model(name, source, warmup_steps=2)
    again = trainer(tmp_path, max_epochs=4, strategy=SingleDevice())
    again.fit(second, datamodule=source, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))

    again.save_checkpoint(tmp_path / "model.ckpt")
    loaded = MODELS[name].load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert loaded.labels == second.labels
    assert "optimizer" not in loaded.hparams
    batch = next(iter(source.val_dataloader()))
    assert list(loaded.predict_step(batch)) == list(second.eval().predict_step(batch))
    again.test(second, datamodule=source, verbose=False)
    assert any(key.startswith("test/f1/") for key in again.callback_metrics)


@both
def test_texts_of_any_length_are_predicted(name: str, tmp_path: Path) -> None:
    """Windows are put together, characters are those of the whole text, and every relation is said once."""
    source = data(max_length=40, stride=20)
    module = model(name, source, **({"threshold": 0.03} if name == "lic2020_relation" else {})).eval()
    module.configure_model()
    long = "".join(record.text for record in source.records("train")[:6])
    records = [RelationRecord("1", "龘"), RelationRecord("2", long), RelationRecord("3", "没见过的 latin 😀")]
    batch = source.collator()(records)
    assert len(batch["ids"]) > 5
    found = list(module.predict_step(batch))
    assert [(record.id, record.text) for record in found] == [(record.id, record.text) for record in records]
    assert found[1].relations
    assert without_repeated(found[1].relations) == found[1].relations
    for relation in found[1].relations:
        for span in (relation.subject, *relation.object):
            assert long[span.start : span.end] == span.text


@both
def test_config_binds_and_wrong_values_are_explained(name: str) -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / "conf" / "model" / f"{name}.yaml").read_text("utf-8"))
    kind = MODELS[name]
    assert config.pop("_target_") == f"{kind.__module__}.{kind.__name__}"
    assert set(config) <= set(inspect.signature(kind).parameters)
    kind(10, [["a", VALUE_SLOT]], **{**config, "optimizer": None}).configure_model()
    with pytest.raises(InputError, match=rf"{kind.__name__}\(labels=\[\]\): give at least one \[predicate, slot\]"):
        kind(10, [])
    with pytest.raises(InputError, match=rf"{kind.__name__}\(schedule='cosine'\)"):
        kind(10, [["a", VALUE_SLOT]], schedule="cosine")


def train_on_ranks(folder: str) -> dict[tuple[str, str], Any]:
    """Both models on DDP and ZeRO 2, and in bf16, in one group of processes."""
    found = {}
    for name in MODELS:
        for base, precision in (("ddp", "32-true"), ("zero_2", "32-true"), ("zero_2", "bf16-mixed")):
            source = data(26, batch_size=4)
            module = model(name, source)
            module._optimizer = functools.partial(torch.optim.SGD, lr=1e-4)
            runner = trainer(
                folder, devices=WORLD, strategy=make_strategy(base, []), precision=precision, max_epochs=2,
                use_distributed_sampler=False,
            )  # fmt: skip
            torch.manual_seed(100 + RANK)
            runner.fit(module, datamodule=source)
            figures = {key: value.item() for key, value in runner.callback_metrics.items()}
            found[name, f"{base} {precision}"] = (full_weights(module), figures)
    return found


@pytest.mark.slow
def test_two_processes_train_alike_on_zero_and_in_bf16(tmp_path: Path) -> None:
    first, second = run_ranks(train_on_ranks, 2, str(tmp_path))
    for name in MODELS:
        plain, zero, half = (first[name, key] for key in ("ddp 32-true", "zero_2 32-true", "zero_2 bf16-mixed"))
        for key, value in plain[0].items():
            torch.testing.assert_close(torch.tensor(zero[0][key]), torch.tensor(value), atol=1e-6, rtol=1e-5)
            assert torch.isfinite(torch.tensor(half[0][key])).all()
        assert half[1]["val/loss"] == pytest.approx(plain[1]["val/loss"], rel=0.05)
        assert zero[1]["val/loss"] != half[1]["val/loss"]
        assert second[name, "zero_2 32-true"][1]["val/f1"] == zero[1]["val/f1"]


@pytest.fixture(scope="module")
def duie() -> RelationDataModule:
    root = os.environ.get("KEXUE_DATA")
    if not root or not (Path(root) / "relation_extraction_duie").is_dir():
        pytest.skip("KEXUE_DATA does not name a folder with relation_extraction_duie")
    module = RelationDataModule(batch_size=8, root=root)
    module.setup("fit")
    return module


@pytest.mark.slow
@both
def test_60_real_sentences_are_learnt_by_heart(name: str, duie: RelationDataModule, tmp_path: Path) -> None:
    rows = duie.records("train")[:60]
    source = RelationDataModule(batch_size=8, root=str(duie.root))
    for split in ("train", "val"):
        source.set_records(split, rows)
    pl.seed_everything(0, verbose=False)
    size = {"dim": 128, "num_layers": 2, "num_heads": 4, "feedforward_dim": 512, "dropout": 0.0}
    module = MODELS[name](
        **source.model_arguments() | {"labels": duie.labels},
        **size,
        warmup_steps=50,
        schedule="linear",
        optimizer=functools.partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.01),
    )
    runner = trainer(tmp_path, max_epochs=80, gradient_clip_val=1.0, check_val_every_n_epoch=80)
    runner.fit(module, datamodule=source)
    assert runner.callback_metrics["val/f1"] > 0.95


class GoldHead(torch.nn.Module):
    """Logits of a model that is never wrong on a batch."""

    def __init__(self, batch: dict[str, Any], num_labels: int) -> None:
        super().__init__()
        self.triples, self.length, self.num_labels = batch["triple_labels"], batch["ids"].shape[1], num_labels

    def find_subjects(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(self.triples), self.length, 2), -20.0)
        rows, places = (self.triples[..., 0] >= 0).nonzero(as_tuple=True)
        for column in (0, 1):
            logits[rows, self.triples[rows, places, 1 + column], column] = 20
        return logits

    def find_objects(self, hidden: torch.Tensor, rows: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
        return 40 * object_targets(self.triples[rows], spans, self.length, self.num_labels) - 20


def decoded_gold(name: str, module: Any, batch: dict[str, Any]) -> list[RelationRecord]:
    """From the cells of a batch back to its records."""
    if name == "lic2020_relation":
        module.head = GoldHead(batch, len(module.labels))
        return records_of(batch, module._decode(torch.zeros(len(batch["ids"]), 1, 1), batch))
    rows, length = batch["ids"].shape
    links = len(module.labels) + len(module.links)
    scores = {}
    for pointer, heads in (("entities", 2), ("heads", links), ("tails", links)):
        cells = batch[module.TARGETS[pointer]]
        matrix = -torch.ones(rows, heads, length, length)
        row, place = (cells[..., 0] >= 0).nonzero(as_tuple=True)
        matrix[(row, *cells[row, place].T)] = 1
        scores[pointer] = matrix
    return module._extract(scores, batch)


def differences(name: str, module: Any, loader: Any) -> tuple[int, int, int, int]:
    """Rows, rows that do not come back as they are, gold relations lost in them, others found in them."""
    total = inexact = lost = added = 0
    for batch in loader:
        for found, gold in zip(decoded_gold(name, module, batch), batch["records"], strict=True):
            said, wanted = set(plain_relations(found)), set(plain_relations(gold))
            assert len(said) == len(found.relations)
            total += 1
            inexact += said != wanted
            lost += len(wanted - said)
            added += len(said - wanted)
    return total, inexact, lost, added


@pytest.mark.parametrize("window", [(256, 192), (24, 16)])
@pytest.mark.parametrize("occurrences", ["first", "all"])
def test_generated_relations_come_back(window: tuple[int, int], occurrences: str) -> None:
    """Also through windows, but for those relations that no window holds whole, which are known beforehand."""
    source = data(300, max_length=window[0], stride=window[1], occurrences=occurrences)
    module = model("gplinker_relation", source)
    cut = sum(len(lost) for _, lost in source.cut_by_windows("train"))
    assert (cut > 0) == (window[0] < 60)
    total, _, lost, added = differences("gplinker_relation", module, source.train_dataloader())
    assert (total, lost) == (300, cut)
    assert added <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "occurrences", "expected"),
    [
        ("gplinker_relation", "first", (4500, 2, 0, 3)),
        ("gplinker_relation", "nearest", (4500, 2, 0, 3)),
        ("gplinker_relation", "all", (4500, 2, 0, 3)),
        ("lic2020_relation", "first", (4500, 24, 30, 10)),
    ],
)
def test_all_real_relations_come_back(
    name: str, occurrences: str, expected: tuple[int, int, int, int], duie: RelationDataModule
) -> None:
    """GPLinker loses none; a few rows get others besides, where the links of several relations form one more.

    The model in two stages loses those of nested subjects and of objects of several slots that it cannot tell apart.
    """
    source = RelationDataModule(batch_size=32, root=str(duie.root), occurrences=occurrences)
    source.setup("fit")
    assert source.cut_by_windows("train") == source.cut_by_windows("val") == []
    module = model(name, source)
    parts = [differences(name, module, loader) for loader in (source.train_dataloader(), source.val_dataloader())]
    assert tuple(sum(column) for column in zip(*parts, strict=True)) == expected
