"""The tagger of the Daguan cup on built-in sentences: each plan learns, and none of the known mistakes is made."""

import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from daguan_models import PLANS, built, data, model, techniques
from ner_models import trainer

from kexue.callbacks import Checkpoints
from kexue.errors import InputError
from kexue.lightning_modules.extraction import DaguanIE
from kexue.lightning_modules.extraction.ner import inner_places, plain_spans
from kexue.nn.decoding import TypedScores
from kexue.nn.heads import start_end_classes
from kexue.strategies import Lookahead, MultiSampleDropout, SingleDevice

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_20_sentences_are_learnt_by_heart(plan: str, tmp_path: Path) -> None:
    source = data(min_count=1)
    source.set_records("val", source.records("train"))
    epochs = 320 if plan == "span_hard" else 160  # a class told as one number is harder to read
    runner = trainer(
        tmp_path,
        max_epochs=epochs,
        strategy=SingleDevice(techniques=techniques(plan)),
        gradient_clip_val=5.0,
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
    )
    runner.fit(model(plan, source, warmup_steps=10, schedule="linear"), datamodule=source)
    assert runner.callback_metrics["val/f1"] == 1.0


@pytest.mark.parametrize("options", [{}, {"max_length": 24, "stride": 8}], ids=["whole", "windows"])
@pytest.mark.parametrize("plan", ["crf", "span_soft"])
def test_gold_scores_become_gold_records(plan: str, options: dict[str, Any]) -> None:
    """Segments to tags or classes to spans to segments."""
    source = data(60, **options)
    module = built(plan, source)
    for batch in [*source.train_dataloader(), *source.val_dataloader()]:
        length = batch["ids"].shape[1]
        if plan == "crf":
            tags = module.scheme.tags(batch["flat_labels"], length)[:, 1:-1]
            assert (tags[~inner_places(batch)[:, 1:-1]] == 0).all()
            module.head.crf.forward = lambda *_, tags=tags: tags  # type: ignore[union-attr, method-assign]
        else:
            gold = [torch.eye(4)[part[:, 1:-1]] for part in start_end_classes(batch["flat_labels"], length)]
            module.head.forward = lambda *_, gold=gold: gold  # type: ignore[method-assign, misc]
        answers = module._extract(torch.zeros(*batch["ids"].shape, 32), batch)
        for found, record in zip(answers, batch["records"], strict=True):
            assert (found.id, found.text) == (record.id, record.text)
            assert plain_spans(found) == sorted(plain_spans(record), key=lambda span: span[1])


def test_every_parameter_is_in_one_group_with_its_rate() -> None:
    """The norm of the trunk among them; the rates fall from block to block, the embeddings are the lowest."""
    module = built("crf", data(), encoder_rate=0.1, layer_decay=0.5, crf_rate=3.0)
    optimizer = module.configure_optimizers()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names)
    rates = {names[id(p)]: group["lr"] / 5e-3 for group in optimizer.param_groups for p in group["params"]}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert (
        rates["trunk.norm.weight"] == rates["trunk.layers.0.ahead.weight_hh_l0"] == rates["head.emissions.bias"] == 1.0
    )
    assert rates["head.crf.transitions"] == pytest.approx(3.0)
    blocks = [rates[f"encoder.layers.blocks.{block}.attention_norm.weight"] for block in (0, 1)]
    assert [rates["encoder.embedding.tokens.weight"], *blocks] == pytest.approx([0.025, 0.05, 0.1])
    assert rates["encoder.layers.norm.weight"] == pytest.approx(0.1)
    assert {name for name, decay in decays.items() if decay == 0} == {
        name for name, parameter in module.named_parameters() if parameter.dim() == 1
    }
    before = [parameter.clone() for parameter in module.parameters()]
    batch = next(iter(data().train_dataloader()))
    module.training_step(batch, 0)["loss"].backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert all(moved), [n for n, m in zip(dict(module.named_parameters()), moved, strict=True) if not m]


def test_gradients_are_clipped_once(tmp_path: Path) -> None:
    """The step of plain SGD is exactly as long as the limit on all gradients together."""
    source = data(10)
    module = model("crf", source)
    module._optimizer = lambda parameters: torch.optim.SGD(parameters, lr=1.0)
    module.configure_model()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    runner = trainer(tmp_path, max_steps=1, gradient_clip_val=0.01, limit_val_batches=0)
    runner.fit(module, datamodule=source)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, module.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("plan", ["crf", "span_hard"])
def test_scores_are_those_of_all_batches(plan: str, tmp_path: Path) -> None:
    source = data(100, eval_batch_size=3)
    module = model(plan, source, trunk_layers=1)
    runner = trainer(tmp_path, max_epochs=10, num_sanity_val_steps=0, check_val_every_n_epoch=10)
    runner.fit(module, datamodule=source)
    gold = source.records("val")
    scores = TypedScores(source.types)
    for batch in source.val_dataloader():
        found = {record.id: record for record in module.eval().predict_step(batch)}
        scores.update([plain_spans(found[r.id]) for r in batch["records"]], [plain_spans(r) for r in batch["records"]])
    assert len(gold) == 10
    assert 0 < runner.callback_metrics["val/f1"] == pytest.approx(scores.compute()["f1"].item())
    assert scores.counts.sum(0)[2] == sum(len(record.spans) for record in gold)


@pytest.mark.parametrize("plan", ["crf_multi_sample", "span_soft"])
def test_a_fold_resumes_bit_for_bit_with_its_slow_weights_and_its_best_score(plan: str, tmp_path: Path) -> None:
    source = data(30, fold=1, num_folds=3)

    def run(epochs: int, folder: str, path: Path | None = None) -> tuple[DaguanIE, Checkpoints]:
        module = model(plan, source, encoder_rate=0.5, dropout=0.1, trunk_dropout=0.2)
        kept = Checkpoints(str(tmp_path / folder), monitor="val/f1", mode="max")
        strategy = SingleDevice(techniques=[*techniques(plan), Lookahead(k=2)])
        callbacks = {"callbacks": [kept], "enable_checkpointing": True}
        trainer(tmp_path, max_epochs=epochs, strategy=strategy, **callbacks).fit(
            module, datamodule=source, ckpt_path=path
        )
        return module, kept

    whole, best = run(4, "whole")
    run(2, "half")
    rest, resumed = run(4, "half", tmp_path / "half" / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    assert best.best_value is not None
    assert 0 <= best.best_value <= 1, "the best score is a score, not the number of an epoch"
    assert resumed.best_value == best.best_value


def test_the_plan_with_several_masks_is_the_plain_one_in_evaluation() -> None:
    source = data()
    batch = next(iter(source.train_dataloader()))
    plain, many = built("crf", source), built("crf", source)
    technique = MultiSampleDropout(num_samples=5, p=0.5, head="head.emissions", reduction="mean_logits")
    technique.attach(many)
    assert torch.equal(*(m.eval().losses(m.features(batch), batch, True)["tags"] for m in (plain, many)))
    losses = [m.train().losses(m.features(batch), batch, True)["tags"] for m in (plain, many)]
    assert not torch.equal(*losses)
    technique.detach(many)
    # One mask is plain dropout: the same features dropped, the same logits.
    one = MultiSampleDropout(num_samples=1, p=0.5, head="head.emissions", reduction="mean_logits")
    one.attach(many)
    seen: list[torch.Tensor] = []
    many.head.emissions.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    features = plain.features(batch)
    many.task_losses(features, batch)
    real = inner_places(batch)[:, 1:-1]
    kept = (seen[0] != 0) & real[..., None]
    torch.testing.assert_close(seen[0][kept], 2 * features[:, 1:-1][kept])
    assert (kept.sum() / real.sum() / 32).item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("plan", PLANS)
def test_padding_changes_nothing(plan: str) -> None:
    source = data(40)
    module = built(plan, source).eval()
    records = sorted(source.records("train"), key=lambda record: len(record.text))
    short, mixed = source.collator()(records[:2]), source.collator()([*records[:2], records[-1]])
    width = short["ids"].shape[1]
    inside = short["mask"]
    torch.testing.assert_close(module.features(mixed)[:2, :width][inside], module.features(short)[inside])
    assert list(module.predict_step(mixed))[:2] == list(module.predict_step(short))


@pytest.mark.parametrize("plan", PLANS)
def test_bf16_learns(plan: str, tmp_path: Path) -> None:
    source = data(20, 20)
    module = model(plan, source)
    values: list[float] = []
    step = module.training_step
    module.training_step = lambda *args: values.append(step(*args)["loss"].item()) or step(*args)  # type: ignore
    runner = trainer(tmp_path, max_epochs=15, precision="bf16-mixed", limit_val_batches=0)
    runner.fit(module, datamodule=source)
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trunk": "gru"}, r"DaguanIE\(trunk='gru'\): use one of lstm, convolution, none"),
        ({"head": "pointer"}, "use one of crf, span"),
        ({"start_label": "gold"}, "use one of hard, soft"),
        ({"layer_decay": 0.0}, r"DaguanIE\(layer_decay=0.0\): use a number above 0"),
        ({"trunk_layers": 0}, "use 1 or more"),
        ({"types": []}, "give at least one, each once"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DaguanIE(10, **{"types": ["a", "b"], **options})


def test_config_binds_and_all_combinations_can_be_built() -> None:
    config = yaml.safe_load((CONF / "model" / "daguan_ie.yaml").read_text(encoding="utf-8"))
    assert config.pop("_target_") == f"{DaguanIE.__module__}.{DaguanIE.__name__}"
    assert set(config) <= set(inspect.signature(DaguanIE).parameters)
    source = data()
    batch = next(iter(source.train_dataloader()))
    for trunk, head in itertools.product(("lstm", "convolution", "none"), ("crf", "span")):
        module = built("crf", source, trunk=trunk, head=head)
        module.training_step(batch, 0)["loss"].backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
