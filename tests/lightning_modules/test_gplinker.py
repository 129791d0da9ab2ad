"""EventGPLinker on built-in sentences: it learns, resumes, predicts characters, and explains wrong arguments."""

import functools
import inspect
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml

from kexue.cli.targets import build
from kexue.data.events import EventDataModule
from kexue.data.records import TRIGGER_ROLE, Argument, Event, EventRecord
from kexue.errors import InputError
from kexue.lightning_modules.extraction.gplinker import EventGPLinker, plain_events, without_contained
from kexue.nn.losses import ExactLoss, multilabel_pointer_loss
from kexue.nn.transformer import encode

TINY = {"dim": 32, "num_layers": 1, "num_heads": 2, "feedforward_dim": 64, "dropout": 0.0, "head_size": 16}


def data(rows: int = 24, batch_size: int = 8) -> EventDataModule:
    module = EventDataModule(batch_size=batch_size, num_generated=rows)
    module.prepare()
    return module


def model(source: EventDataModule, **options) -> EventGPLinker:
    pl.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=3e-3)
    return EventGPLinker(**source.model_arguments(), **{**TINY, **options}, optimizer=optimizer)


def trainer(folder: Path, **options) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )


@pytest.mark.parametrize("head", ["efficient", "standard"])
def test_loss_on_one_batch_falls(head: str) -> None:
    source = data(10)
    source.setup("fit")
    module = model(source, head=head)
    module.configure_model()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch, optimizer = next(iter(source.train_dataloader())), module.configure_optimizers()
    losses = []
    for _ in range(60):
        output = module.training_step(batch, 0)
        assert output["loss"].item() == pytest.approx(sum(loss.item() for loss in output["losses"].values()), rel=1e-5)
        optimizer.zero_grad()
        output["loss"].backward()
        optimizer.step()
        losses.append(output["loss"].item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_packed_rows_give_the_losses_and_gradients_of_padded_ones() -> None:
    plain, found = data(16, 16), []
    rows = EventDataModule(batch_size=16, num_generated=16, row_budget=128)
    rows.prepare()
    for source in (plain, rows):
        source.setup("fit")
        module = model(source, positions="learned")
        module.configure_model()
        batch = next(iter(source.train_dataloader()))
        losses = module.task_losses(encode(module.encoder, batch), batch)
        torch.stack(list(losses.values())).sum().backward()
        found.append(([loss.item() for loss in losses.values()], [p.grad for p in module.parameters()]))
    assert batch["starts"][:, 0].max() < 15, "no two sentences share a row"
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)


def test_the_network_is_built_once_and_offers_its_parts() -> None:
    module = model(data())
    module.configure_model()
    weights = list(module.parameters())
    module.configure_model()
    assert all(one is other for one, other in zip(module.parameters(), weights, strict=True))
    assert [type(block).__name__ for block in module.blocks()] == ["TransformerBlock"]


def test_task_losses_from_features_are_the_training_losses() -> None:
    source = data()
    source.setup("fit")
    module = model(source)
    module.configure_model()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    batch = next(iter(source.train_dataloader()))
    losses = module.task_losses(module.encoder(batch["ids"], batch["mask"]), batch)
    assert sorted(losses) == ["arguments", "heads", "tails"]
    assert torch.stack(list(losses.values())).sum() == module.training_step(batch, 0)["loss"]


def test_the_pointers_take_a_loss_by_config_and_are_validated_without() -> None:
    config = yaml.safe_load((Path(__file__).parents[2] / "conf" / "loss" / "label_smoothing.yaml").read_text("utf-8"))
    source = data()
    source.setup("fit")
    plain, smoothed = model(source), model(source, loss=build(config, "model.loss"))
    assert plain.hparams.keys() == smoothed.hparams.keys()
    losses, logged = [], []
    batch = next(iter(source.train_dataloader()))
    for module in (plain, smoothed):
        pl.seed_everything(0, verbose=False)
        module.configure_model()
        module.log = lambda name, value, **_: logged.append(value.item())  # type: ignore[method-assign]
        losses.append(module.task_losses(module.encoder(batch["ids"], batch["mask"]), batch))
        module.validation_step(batch, 0)
    scores = smoothed(batch["ids"], batch["mask"])["arguments"]
    expected = multilabel_pointer_loss(scores, batch["argument_labels"], smoothing=0.1)
    torch.testing.assert_close(losses[1]["arguments"], expected)
    assert losses[1]["arguments"] != losses[0]["arguments"]
    assert logged[0] == logged[1]


def test_fit_logs_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    source = data()
    whole = model(source, warmup_steps=2)
    runner = trainer(tmp_path, max_epochs=4)
    runner.fit(whole, datamodule=source)
    levels = {
        f"val/{level}_{name}" for level in ("event", "argument", "type") for name in ("f1", "precision", "recall")
    }
    assert {*levels, "val/loss", "train/loss"} <= set(runner.callback_metrics)

    first = trainer(tmp_path, max_epochs=2)
    first.fit(model(source, warmup_steps=2), datamodule=source)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = model(source, warmup_steps=2)
    trainer(tmp_path, max_epochs=4).fit(second, datamodule=source, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_gives_the_same_model(tmp_path: Path) -> None:
    source = data()
    module = model(source)
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(module, datamodule=source)
    runner.save_checkpoint(tmp_path / "model.ckpt")
    loaded = EventGPLinker.load_from_checkpoint(tmp_path / "model.ckpt").eval()
    assert loaded.labels == module.labels
    assert "optimizer" not in loaded.hparams
    batch = next(iter(source.val_dataloader()))
    assert list(loaded.predict_step(batch)) == list(module.eval().predict_step(batch))


def test_gold_scores_become_gold_records() -> None:
    """From the cells of a batch back to the records, in characters: nothing is lost between text and matrices."""
    source = data(40)
    source.setup("fit")
    module = model(source)
    for batch in source.train_dataloader():
        rows, length = batch["ids"].shape
        scores = {}
        for name, heads in (("argument", len(module.labels)), ("head", 1), ("tail", 1)):
            matrix = -torch.ones(rows, heads, length, length)
            row, place = (batch[f"{name}_labels"][..., 0] >= 0).nonzero(as_tuple=True)
            matrix[(row, *batch[f"{name}_labels"][row, place].T)] = 1
            scores[f"{name}s"] = matrix
        for found, gold in zip(module._extract(scores, batch), batch["records"], strict=True):
            assert (found.id, found.text) == (gold.id, gold.text)
            assert sorted((kind, sorted(spans)) for kind, spans in plain_events(found)) == sorted(
                (kind, sorted(spans)) for kind, spans in plain_events(gold)
            )
            assert all(found.text[a.start : a.end] == a.text for event in found.events for a in event.arguments)


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    source = data()
    module = model(source, warmup_steps=2, schedule="linear")
    rates: list[float] = []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(tmp_path, max_epochs=2, callbacks=[Rates()]).fit(module, datamodule=source)
    assert rates == pytest.approx([3e-3 * share for share in (1 / 2, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])


def test_events_that_add_nothing_are_left_out_of_answers() -> None:
    trigger, again = Argument(TRIGGER_ROLE, "胜", 4), Argument(TRIGGER_ROLE, "胜", 9)
    winner = Argument("胜者", "甲队", 0)
    full, alone, other = Event("胜负", (winner, trigger)), Event("胜负", (again,)), Event("晋级", (again,))
    assert without_contained([alone, full, other]) == (full, other)
    assert without_contained([full, full]) == (full,)


def test_a_foreign_record_of_any_text_is_predicted(tmp_path: Path) -> None:
    source = data()
    module = model(source)
    runner = trainer(tmp_path, max_epochs=1)
    runner.fit(module, datamodule=source)
    records = [EventRecord("1", "龘"), EventRecord("2", "完全没见过的句子 with latin 😀")]
    source.set_records("predict", records)
    found = [record for batch in runner.predict(module, datamodule=source) for record in batch]
    assert sorted((record.id, record.text) for record in found) == [(record.id, record.text) for record in records]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "at least one"),
        ([["a", "b"], ["a", "b"]], r"\['a', 'b'\] is there twice"),
        ([["a"]], r"entry 0 is \['a'\]"),
        (["ab"], "entry 0 is 'ab'"),
    ],
)
def test_wrong_labels_are_explained(labels: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EventGPLinker(10, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "big"}, "efficient, standard"),
        ({"schedule": "cosine"}, "constant, linear"),
        ({"dim": 30}, "must divide"),
        ({"loss": ExactLoss()}, "loss=ExactLoss.*use loss=label_smoothing, or none"),
    ],
)
def test_wrong_options_are_explained(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EventGPLinker(10, [["a", "b"]], **options)


def test_config_binds_to_the_constructor() -> None:
    path = Path(__file__).parents[2] / "conf" / "model" / "gplinker_event.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config.pop("_target_") == f"{EventGPLinker.__module__}.EventGPLinker"
    assert set(config) <= set(inspect.signature(EventGPLinker).parameters)
    module = EventGPLinker(10, [["a", "b"]], **{**config, "optimizer": None})
    module.configure_model()
    assert module(torch.ones(1, 4, dtype=torch.long))["arguments"].shape == (1, 1, 4, 4)
