"""Lic2020Event on built-in sentences: tags and back, what the CRF may say, learning, resuming, wrong arguments."""

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from event_taggers import OUTPUTS, built, data, model, sayable, triples
from ner_models import trainer
from torch.func import functional_call

from kexue.callbacks.prediction_table import PredictionTable
from kexue.data.records import TRIGGER_ROLE, Argument, Event, EventRecord
from kexue.errors import InputError
from kexue.lightning_modules.extraction import EventGPLinker, Lic2020Event
from kexue.lightning_modules.extraction.lic2020_event import JointTags
from kexue.nn.transformer import encode

CONF = Path(__file__).parents[2] / "conf"
LABELS = [["a", TRIGGER_ROLE], ["a", "r"], ["a", "s"], ["b", "r"]]


@pytest.mark.parametrize("output", OUTPUTS)
def test_spans_without_overlap_come_back(output: str) -> None:
    joint = JointTags(3, output == "multi")
    cells = torch.tensor([[(2, 1, 2), (0, 3, 3), (1, 5, 8)], [(1, 4, 4), (-1, -1, -1), (-1, -1, -1)]])
    tags = joint.tags(cells, 10)
    assert tags.shape == (2 * joint.num_layers, 10)
    for inside in ("strict", "any"):
        assert [sorted(row) for row in joint.spans(tags, inside)] == [[(0, 3, 3), (1, 5, 8), (2, 1, 2)], [(1, 4, 4)]]


def test_tags_of_one_layer_are_2_k_plus_1_and_2_k_plus_2() -> None:
    tags = JointTags(3, False).tags(torch.tensor([[(2, 1, 3), (0, 4, 4), (1, 2, 2)]]), 6)
    assert tags.tolist() == [[0, 5, 6, 6, 1, 0]]  # the one inside another is left out


def test_a_layer_each_says_what_overlaps() -> None:
    cells = torch.tensor([[(0, 1, 3), (1, 1, 3), (2, 2, 2)]])
    joint = JointTags(3, True)
    tags = joint.tags(cells, 5)
    assert tags.tolist() == [[0, 1, 2, 2, 0], [0, 1, 2, 2, 0], [0, 0, 1, 0, 0]]
    assert joint.spans(tags, "strict") == [[(0, 1, 3), (1, 1, 3), (2, 2, 2)]]


def test_an_inside_after_another_beginning() -> None:
    """Of the source: it goes on. Strict: such tags have no path, whatever the emissions say."""
    ids, mask = torch.tensor([[2, 9, 9, 9, 9, 3]]), torch.ones(1, 6, dtype=torch.bool)
    emissions = torch.zeros(1, 6, 1 + 2 * 3)
    for place, tag in enumerate([0, 1, 4, 4, 6, 0]):  # B of pair 0, I of pair 1 twice, I of pair 2
        emissions[0, place, tag] = 9
    found = {}
    for inside in ("any", "strict"):
        module = Lic2020Event(10, LABELS, inside=inside, dim=8, num_heads=2, num_layers=1, feedforward_dim=8)
        module.configure_model()
        module.head.emissions.forward = lambda _: emissions  # type: ignore[method-assign]
        tags = module(ids, mask)
        found[inside] = module.joint.spans(tags, module.inside)
        follows = module.joint.scheme.allowed()[0]
        assert follows[tags[0, :-1], tags[0, 1:]].all() == (inside == "strict")
    assert found["any"] == [[(0, 1, 4)]]
    assert found["strict"][0] != found["any"][0]


@pytest.mark.parametrize("inside", ["strict", "any"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_first_position_is_outside(output: str, inside: str) -> None:
    source = data(10)
    module = built(source, output=output, inside=inside)
    torch.nn.init.constant_(module.head.emissions.bias, 0.0)
    module.head.emissions.bias.data[0 if output == "multi" else 1] = 60.0  # a beginning everywhere
    batch = next(iter(source.val_dataloader()))
    tags = module(batch["ids"], batch["mask"])
    assert (tags[:, 0] == 0).all()
    assert (tags[:: module.joint.num_layers, 1] == 1).all()
    for record, found in zip(batch["records"], module.predict_step(batch), strict=True):
        assert all(record.text[a.start : a.end] == a.text for e in found.events for a in e.arguments)


def test_a_text_has_one_pair_or_any_number() -> None:
    text = "甲乙丙甲乙"
    gold = EventRecord(
        "x",
        text,
        (
            Event("a", (Argument(TRIGGER_ROLE, "丙", 2), Argument("r", "甲乙", 0), Argument("s", "甲乙", 3))),
            Event("b", (Argument("r", "甲乙", 0), Argument("r", "乙", 4))),
        ),
    )
    source = data(10)
    source.labels = LABELS
    batch = source.collator()([gold])
    found = {}
    for output in OUTPUTS:
        module = Lic2020Event(10, LABELS, output=output)
        (found[output],) = module.records_of(module.gold_tags(batch), batch)
        assert triples(module.expected(gold)) == triples(gold)
        assert triples(module.expected(gold), triggers=True) == triples(gold)
    assert triples(found["multi"]) == triples(gold)
    assert found["multi"] == Lic2020Event(10, LABELS, output="multi").expected(gold)
    assert triples(found["unique"]) == {("a", "s", "甲乙")}  # the last one found
    module = Lic2020Event(10, LABELS, output="multi", triggers=True)
    assert triples(module.records_of(module.gold_tags(batch), batch)[0], triggers=True) == triples(gold, triggers=True)


@pytest.mark.parametrize("options", [{}, {"max_length": 34, "stride": 12}], ids=["whole", "windows"])
def test_gold_tags_become_gold_records(options: dict[str, Any]) -> None:
    """What layers cannot say is what sets of characters cannot; windows that have 21 characters in common lose none."""
    source = data(60, **options)
    assert not source.cut_by_windows("train")
    for output in OUTPUTS:
        module, more = model(source, output=output), 0
        for batch in source.train_dataloader():
            more += len(batch["ids"]) - len(batch["records"])
            for found, gold in zip(module.records_of(module.gold_tags(batch), batch), batch["records"], strict=True):
                assert (found.id, found.text) == (gold.id, gold.text)
                assert triples(found) <= triples(gold)
                said = triples(found) if output == "multi" else {(text,) for _, _, text in triples(found)}
                assert said == sayable(gold, output == "multi")
        assert (more > 0) == bool(options)


@pytest.mark.parametrize("inside", ["strict", "any"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_batch_is_learnt_by_heart(output: str, inside: str) -> None:
    source = data(20, 20)
    factory = functools.partial(torch.optim.AdamW, lr=1e-2)
    module = built(source, output=output, inside=inside, boundary_scores=inside == "any", optimizer=factory)
    batch, optimizer = next(iter(source.train_dataloader())), module.configure_optimizers()
    losses = []
    for _ in range(150):
        loss = module.training_step(batch, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert list(module.eval().predict_step(batch)) == module.records_of(module.gold_tags(batch), batch)
    if output == "multi":
        module.evaluate(encode(module.encoder, batch), batch)
        assert module.scores.compute()["f1"] == 1


def test_the_group_s_rate_is_that_of_larger_transitions() -> None:
    """A = 100 A' learns as A with 100 times the rate does: the same first step of Adam."""
    source = data(10)
    module = built(source, crf_rate=100.0, optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-5))
    batch = next(iter(source.train_dataloader()))
    features, tags = encode(module.encoder, batch).detach(), module.gold_tags(batch)
    before = module.head.crf.transitions.detach().clone()
    small = (before / 100).requires_grad_()
    functional_call(module.head, {"crf.transitions": 100 * small}, (features, batch["mask"], tags)).mean().backward()
    torch.optim.Adam([small], lr=1e-5).step()
    optimizer = module.configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-3])
    assert optimizer.param_groups[1]["params"] == [module.head.crf.transitions]
    module.head(features, batch["mask"], tags).mean().backward()
    optimizer.step()
    gradient = module.head.crf.transitions.grad
    clear = gradient.abs() > 1e-4  # next to Adam's epsilon of 1e-8
    assert clear.sum() > 100
    steps = module.head.crf.transitions.detach() - before, 100 * small.detach() - before
    torch.testing.assert_close(steps[0][clear], steps[1][clear], rtol=2e-3, atol=0)
    assert steps[0][clear].abs().mean() == pytest.approx(1e-3, rel=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("output", OUTPUTS)
def test_half_precision_and_long_padding(output: str, dtype: torch.dtype) -> None:
    """The loss of a sentence stays what it is, within what half precision rounds, and so do the tags."""
    module = built(data(10), output=output).to(dtype)
    features, mask = 30 * torch.randn(2, 400, 32).to(dtype), torch.arange(400) < torch.tensor([[400], [5]])
    cells = torch.tensor([[(0, 1, 3), (3, 100, 120)], [(1, 2, 3), (-1, -1, -1)]])
    tags = module.joint.tags(cells, 400)
    losses = module.head(features, mask, tags)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    layers = module.joint.num_layers
    alone = module.head(features[1:, :5], mask[1:, :5], tags[layers:, :5])
    torch.testing.assert_close(losses[1:], alone, rtol=1e-2, atol=1e-2)
    losses.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.head.parameters())
    assert (module.head(features, mask)[layers:, 5:] == 0).all()


@pytest.mark.parametrize("output", OUTPUTS)
def test_packed_rows_give_the_losses_of_padded_ones(output: str) -> None:
    found = []
    for options in ({}, {"row_budget": 128}):
        source = data(16, 16, **options)
        module = built(source, output=output, positions="learned")
        batch = next(iter(source.train_dataloader()))
        found.append(module.task_losses(encode(module.encoder, batch), batch)["tags"].item())
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_fit_logs_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    source = data(60, max_length=40, stride=20)
    options: dict[str, Any] = {"warmup_steps": 2, "output": "multi"}
    whole = model(source, **options)
    runner = trainer(tmp_path, max_epochs=4, callbacks=[PredictionTable()])
    runner.fit(whole, datamodule=source)
    figures = {f"val/{part}{name}" for part in ("", "lcs_", "type_") for name in ("f1", "precision", "recall")}
    assert {*figures, "val/loss", "train/loss"} <= set(runner.callback_metrics)
    assert not any(key.count("/") > 1 for key in runner.callback_metrics)
    runner.test(whole, datamodule=source, verbose=False)
    kinds = {event.type for record in source.records("test") for event in record.events if len(event.arguments) > 1}
    assert kinds
    assert {f"test/recall/{kind}" for kind in kinds} <= set(runner.callback_metrics)
    table = [json.loads(line) for line in (tmp_path / "predictions" / "test.jsonl").read_text("utf-8").splitlines()]
    assert table[0]["wrong"] + table[0]["right"] == len(source.records("test"))
    assert not any(TRIGGER_ROLE in row["gold"] for row in table[1:])

    first = trainer(tmp_path, max_epochs=2)
    first.fit(model(source, **options), datamodule=source)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = model(source, **options)
    trainer(tmp_path, max_epochs=4).fit(second, datamodule=source, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))

    loaded = Lic2020Event.load_from_checkpoint(tmp_path / "half.ckpt").eval()
    assert (loaded.pairs, "optimizer" in loaded.hparams) == (whole.pairs, False)
    texts = {"1": "龘", "2": "没见过的句子 with latin 😀" * 40, "3": ""}
    source.set_records("predict", [EventRecord(name, text) for name, text in texts.items()])
    found = [record for batch in runner.predict(loaded, datamodule=source) for record in batch]  # type: ignore
    assert {record.id: record.text for record in found} == texts
    assert all(r.text[a.start : a.end] == a.text for r in found for e in r.events for a in e.arguments)


def test_gplinker_refuses_windows() -> None:
    source = data(max_length=20, stride=10)
    module = EventGPLinker(**source.model_arguments(), dim=8, num_layers=1, num_heads=2, feedforward_dim=8)
    module.configure_model()
    with pytest.raises(InputError, match=r"use data\.stride=null"):
        module.predict_step(next(iter(source.val_dataloader())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": []}, r"Lic2020Event\(labels=\[\]\): give at least one \[event type, role\]"),
        ({"labels": [["a", "r"], ["a", "r"]]}, "is there twice"),
        ({"labels": ["ab"]}, "entry 0 is 'ab'"),
        ({"labels": [["a", TRIGGER_ROLE]]}, "triggers alone; use triggers=true"),
        ({"output": "both"}, r"Lic2020Event\(output='both'\): use one of unique, multi"),
        ({"inside": "lenient"}, "use one of strict, any"),
        ({"crf_rate": 0.0}, "use a number above 0"),
        ({"schedule": "cosine"}, "use one of constant, linear"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Lic2020Event(10, **{"labels": LABELS, **options})


def test_config_binds_to_the_constructor() -> None:
    config = yaml.safe_load((CONF / "model" / "lic2020_event.yaml").read_text(encoding="utf-8"))
    assert config.pop("_target_") == f"{Lic2020Event.__module__}.{Lic2020Event.__name__}"
    assert set(config) <= set(inspect.signature(Lic2020Event).parameters)
