"""The technique around the rules: what it asks of a module, what it logs and keeps, and what it refuses."""

from __future__ import annotations

import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kexue.errors import InputError
from kexue.strategies import FGM, LossWeighting, MultiSampleDropout, RDrop, SingleDevice, load_weights
from kexue.strategies.loss_weighting import imtl_l, uncertainty
from kexue.strategies.loss_weighting.rules import RULES, Measurement

REQUIRED: dict[str, dict[str, Any]] = {
    "prior": {"reference": {"kind": 1.0, "size": 100.0}},
    "priority": {"main": "kind"},
}
PLAIN = {name: REQUIRED.get(name, {}) for name in RULES}


class Two(pl.LightningModule):
    """Two tasks on one encoder, one of them far larger."""

    def __init__(self, losses: str = "losses", sign: float = 1.0) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)
        self.kind, self.sign = losses, sign

    def task_losses(self, features: Tensor, batch: Tensor) -> dict[str, Tensor]:
        scores = self.head(features)
        size = (scores[:, 2] - 10 * batch.sum(1)).square().mean()
        return {"kind": nn.functional.cross_entropy(scores[:, :2], (batch[:, 0] > 0).long()), "size": self.sign * size}

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        losses = self.task_losses(self.encoder(batch).tanh(), batch)
        loss = torch.stack(list(losses.values())).sum()
        if self.kind == "scalar":
            return loss
        if self.kind == "vectors":
            return {"loss": loss, "losses": {"kind": losses["kind"].expand(3)}}
        if self.kind == "later" and batch_idx == 0:
            losses = {"kind": losses["kind"]}
        return {"loss": loss, "losses": losses}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Foreign(Two):
    """The same without `task_losses`; its losses come from elsewhere."""

    task_losses: Any = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        losses = Two.task_losses(self, self.encoder(batch).tanh(), batch)
        loss = torch.stack(list(losses.values())).sum()
        return loss if self.kind == "scalar" else {"loss": loss, "losses": losses}


class Evaluated(Two):
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Nothing to score."""


class Log(pl.Callback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.rows.append({key: float(value) for key, value in trainer.logged_metrics.items()})


def batches(count: int = 6) -> Tensor:
    return torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(3))


def fit(
    *techniques: Any, model: Any = Two, ckpt_path: Any = None, **options: Any
) -> tuple[Any, list[dict[str, float]]]:
    """Train a module, or what `model()` makes once the seed is set."""
    pl.seed_everything(5, verbose=False)
    model, log = model if isinstance(model, nn.Module) else model(), Log()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            strategy=SingleDevice(techniques),
            logger=False,
            callbacks=[log],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **({"max_epochs": 1, "log_every_n_steps": 1} | options),
        )
        trainer.fit(model, DataLoader(batches(), batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]
    return model, log.rows


def weighted(weights: dict[str, float], steps: int = 1) -> Any:
    """The model after steps of a plain loop with these weights."""
    pl.seed_everything(5, verbose=False)
    model = Two()
    optimizer = model.configure_optimizers()
    for batch in batches()[:steps]:
        losses = model.training_step(batch, 0)["losses"]
        optimizer.zero_grad()
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        optimizer.step()
    return model


def close(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.allclose(p, dict(b.named_parameters())[name], rtol=1e-4, atol=1e-6) for name, p in a.named_parameters()
    )


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_with_the_weights_it_logs(rule: str) -> None:
    model, (row, *_) = fit(LossWeighting(rule, **PLAIN[rule]), max_steps=1)
    weights = {name: row[f"train/weight/{name}"] for name in ("kind", "size")}
    assert close(weighted(weights), model)
    assert row["train/loss/size"] > row["train/loss/kind"] > 0
    assert ("train/cosine/kind_size" in row) == RULES[rule].uses_gradients


@pytest.mark.parametrize("rule", RULES)
def test_a_scalar_step_is_known_by_the_losses_of_task_losses(rule: str) -> None:
    model, _ = fit(LossWeighting(rule, **PLAIN[rule]), model=partial(Two, "scalar"))
    other, _ = fit(LossWeighting(rule, **PLAIN[rule]))
    assert close(model, other)


def test_equal_fixed_weights_are_plain_training() -> None:
    model, _ = fit(LossWeighting("fixed"))
    plain, _ = fit()
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in plain.named_parameters())


@pytest.mark.parametrize("rule", ["mgda", "pcgrad", "priority"])
def test_parameters_are_shared_if_two_tasks_reach_them(rule: str) -> None:
    rows = fit(LossWeighting(rule, **PLAIN[rule], gradients="parameters"))[1]
    assert rows == fit(LossWeighting(rule, **PLAIN[rule]), model=Foreign)[1]
    pl.seed_everything(5, verbose=False)
    model = Two()
    losses = model.training_step(batches()[0], 0)["losses"]
    rows_of = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.encoder.parameters()), retain_graph=True)])
        for loss in losses.values()
    ]
    cosine = torch.cosine_similarity(rows_of[0], rows_of[1], dim=0).item()
    assert rows[0]["train/cosine/kind_size"] == pytest.approx(cosine, abs=1e-5)


def test_learned_scores_have_their_own_rate_and_no_decay() -> None:
    """They are not among the optimiser's parameters, whatever that does; an Adam step has the length of its rate."""
    technique = LossWeighting("uncertainty", lr=0.3)
    _, rows = fit(technique, max_steps=1)
    assert not list(technique._state.parameters())
    s = technique._state.rule.s
    # exp(s) goes towards the loss: up where that is above 1, down where it is below.
    expected = [0.3 if rows[0][f"train/loss/{name}"] > 1 else -0.3 for name in ("kind", "size")]
    assert s.tolist() == [pytest.approx(value, rel=1e-4) for value in expected]


def test_learned_scores_are_clamped() -> None:
    technique = LossWeighting("uncertainty", lr=3.0, clamp=2.0)
    fit(technique)
    assert technique._state.rule.s[1].item() == 2.0


def test_scores_settle_at_the_loss() -> None:
    for rule, sign in (("uncertainty", 1), ("imtl_l", -1)):
        learned = RULES[rule](lr=0.05)
        learned.bind(["kind", "size"])
        losses = torch.tensor([0.1, 7.0], dtype=torch.float64)
        for _ in range(600):
            learned.weigh(Measurement(losses))
        assert torch.allclose(learned.s * sign, losses.log(), atol=0.02)  # type: ignore[operator]


@pytest.mark.parametrize(("rule", "objective"), [("uncertainty", uncertainty), ("imtl_l", imtl_l)])
def test_scores_move_as_torchs_adam_moves_them(rule: str, objective: Any) -> None:
    learned = RULES[rule](lr=0.05, clamp=100.0)
    learned.bind(["a", "b", "c"])
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([s], lr=0.05, betas=(0.9, 0.9))
    source = torch.Generator().manual_seed(1)
    for _ in range(20):
        losses = torch.rand(3, generator=source, dtype=torch.float64) * 3
        learned.weigh(Measurement(losses))
        adam.zero_grad()
        objective(losses, s).backward()
        adam.step()
    assert torch.allclose(learned.s, s, rtol=1e-9)  # type: ignore[arg-type]


def test_a_missing_task_keeps_its_score() -> None:
    for rule in ("uncertainty", "imtl_l", "gradnorm"):
        learned = RULES[rule]()
        learned.bind(["kind", "size"])
        learned.weigh(Measurement(torch.tensor([0.5, 7.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64)))
        before = {name: buffer.clone() for name, buffer in learned.named_buffers()}
        gram = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
        learned.weigh(Measurement(torch.tensor([0.4, torch.nan], dtype=torch.float64), gram))
        assert all(torch.equal(buffer[1], before[name][1]) for name, buffer in learned.named_buffers()), rule
        assert learned.steps.tolist() == [2, 1]


@pytest.mark.parametrize("rule", ["uncertainty", "mgda"])
def test_many_tasks(rule: str) -> None:
    """As many as CelebA has attributes."""

    class Many(Two):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 40)

        def task_losses(self, features: Tensor, batch: Tensor) -> dict[str, Tensor]:
            errors = (self.head(features) - batch.sum(1, keepdim=True)).square().mean(0)
            return {f"attribute_{index}": error for index, error in enumerate(errors.unbind())}

    _, rows = fit(LossWeighting(rule), model=Many, max_steps=2)
    assert sum(name.startswith("train/weight/") for name in rows[1]) == 40


def test_dwa_is_equal_for_two_epochs() -> None:
    _, rows = fit(LossWeighting("dwa"), max_epochs=4)
    weights = [(row["train/weight/kind"], row["train/weight/size"]) for row in rows]
    assert weights[:12] == [(1.0, 1.0)] * 12
    assert all(sum(pair) == pytest.approx(2) for pair in weights)
    means = [sum(row["train/loss/size"] for row in rows[i : i + 6]) / 6 for i in (0, 6)]
    kinds = [sum(row["train/loss/kind"] for row in rows[i : i + 6]) / 6 for i in (0, 6)]
    scores = torch.tensor([kinds[1] / kinds[0] / 2, means[1] / means[0] / 2])
    assert weights[12] == pytest.approx((2 * scores.softmax(0)).tolist(), rel=1e-4)


def test_initial_losses_are_measured_over_the_first_batches() -> None:
    _, rows = fit(LossWeighting("initial", reference_batches=3))
    sizes = [row["train/loss/size"] for row in rows]
    seen = [row["train/weight/size"] for row in rows]
    assert seen[:3] == [pytest.approx(n / sum(sizes[:n]), rel=1e-5) for n in (1, 2, 3)]
    assert seen[3:] == seen[2:3] * 3


def test_smoothing_is_a_running_mean_without_bias() -> None:
    _, rows = fit(LossWeighting("real_time", smoothing=0.8))
    mean = count = 0.0
    for row in rows:
        mean, count = 0.8 * mean + 0.2 * row["train/loss/size"], 0.8 * count + 0.2
        assert row["train/weight/size"] == pytest.approx(count / mean, rel=1e-5)


def test_gradients_are_looked_at_every_n_steps() -> None:
    _, rows = fit(LossWeighting("mgda", every_n_steps=3))
    weights = [row["train/weight/size"] for row in rows]
    assert weights[0] == weights[1] == weights[2] != weights[3] == weights[5]
    assert ["train/cosine/kind_size" in row for row in rows] == [True] * 6  # Lightning keeps the last one


def test_random_weights_follow_seed_and_step() -> None:
    first, again, other = (
        [row["train/weight/kind"] for row in fit(LossWeighting("random", seed=seed))[1]] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(first)) == 6


def test_the_module_stays_as_it_is() -> None:
    for rule in ("fixed", "gradnorm"):
        technique = LossWeighting(rule)
        model, _ = fit(technique)
        assert set(model.state_dict()) == set(Two().state_dict())
        assert "task_losses" not in vars(model)
        assert technique.state_dict()["tasks"] == ["kind", "size"]


def test_a_second_fit_starts_anew_as_the_optimiser_does() -> None:
    technique = LossWeighting("uncertainty")
    model, _ = fit(technique)
    steps = technique._state.rule.steps.clone()
    fit(technique, model=model)
    assert torch.equal(technique._state.rule.steps, steps)


@pytest.mark.parametrize("rule", ["real_time", "mgda"])
def test_with_several_dropout_masks(rule: str) -> None:
    for techniques in (
        [MultiSampleDropout(3, 0.2), LossWeighting(rule)],
        [LossWeighting(rule), MultiSampleDropout(3, 0.2)],
    ):
        _, rows = fit(*techniques)
        assert all(0 <= row["train/weight/size"] <= 1 for row in rows)


def test_r_drop_adds_a_task() -> None:
    class WithLogits(Two):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            features = nn.functional.dropout(self.encoder(batch).tanh(), 0.3)
            losses = self.task_losses(features, batch)
            loss = torch.stack(list(losses.values())).sum()
            return {"loss": loss, "losses": losses, "logits": self.head(features)[:, :2]}

    _, rows = fit(RDrop(), LossWeighting("mgda"), model=WithLogits)
    assert all(row["train/loss/r_drop"] > 0 for row in rows)


# Checkpoints


def test_checkpoints_are_evaluated_without_the_state(tmp_path: Any) -> None:
    path = tmp_path / "run.ckpt"
    model, _ = fit(LossWeighting("uncertainty"))
    model.trainer.save_checkpoint(path)
    weights = load_weights(path)
    assert set(weights) == set(Two().state_dict())
    fresh = Evaluated()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(strategy=SingleDevice(), devices=1, **quiet)
    trainer.test(fresh, DataLoader(batches(), batch_size=None), ckpt_path=path, verbose=False)  # type: ignore[arg-type]
    assert torch.equal(fresh.encoder.weight, model.encoder.weight)


@pytest.mark.parametrize(
    ("techniques", "message"),
    [
        ([], "saved with techniques LossWeighting, now none"),
        ([LossWeighting("dwa")], "saved with rule='uncertainty'; this one starts anew"),
    ],
)
def test_going_on_without_it_or_by_another_rule_is_explained(techniques: Any, message: str, tmp_path: Any) -> None:
    path = tmp_path / "run.ckpt"
    model, _ = fit(LossWeighting("uncertainty"))
    model.trainer.save_checkpoint(path)
    trainer = pl.Trainer(
        strategy=SingleDevice(techniques),
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
    )
    with pytest.warns(UserWarning, match=message):
        trainer.fit(Two(), DataLoader(batches(), batch_size=None), ckpt_path=path)  # type: ignore[arg-type]
    assert trainer.global_step == 12


def test_options_are_not_state(tmp_path: Any) -> None:
    """A resumed run goes by the numbers that it was given, and by the saved names of the tasks in their order."""
    path = tmp_path / "run.ckpt"
    names = {"tasks": ["size", "kind"]}
    for rule, option in (("fixed", "weights"), ("prior", "reference"), ("initial", "reference")):
        model, _ = fit(LossWeighting(rule, **{option: {"kind": 1.0, "size": 2.0}}))
        model.trainer.save_checkpoint(path)
        technique = LossWeighting(rule, **{option: {"kind": 4.0, "size": 8.0}}, **names)
        _, rows = fit(technique, max_epochs=2, ckpt_path=path)
        expected = 4.0 if rule == "fixed" else 0.25
        assert [row["train/weight/kind"] for row in rows] == [expected] * 6
        assert technique._state.tasks == ["kind", "size"]


def test_what_other_options_did_not_keep_starts_anew(tmp_path: Any) -> None:
    path = tmp_path / "run.ckpt"
    model, first = fit(LossWeighting("initial", reference_batches=6))
    model.trainer.save_checkpoint(path)
    _, rows = fit(LossWeighting("initial", reference_batches=6, smoothing=0.5), max_epochs=2, ckpt_path=path)
    assert rows[0]["train/weight/size"] == pytest.approx(first[-1]["train/weight/size"], rel=1e-6)
    _, rows = fit(LossWeighting("initial", reference={"kind": 1.0, "size": 50.0}), max_epochs=2, ckpt_path=path)
    assert rows[0]["train/weight/size"] == pytest.approx(1 / 50)


def test_going_on_with_other_tasks_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "run.ckpt"
    model, _ = fit(LossWeighting("uncertainty"))
    model.trainer.save_checkpoint(path)
    strategy = SingleDevice([LossWeighting("uncertainty", tasks=["kind"])])
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_checkpointing=False
    )
    with pytest.raises(InputError, match=r"the checkpoint has \['kind', 'size'\]; give these"):
        trainer.fit(Two(), DataLoader(batches(), batch_size=None), ckpt_path=path)  # type: ignore[arg-type]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "fasted"}, "no such rule; use one of fixed, initial"),
        ({"rule": "mgda", "gradients": "h"}, "gradients='h'): use one of auto, features, parameters"),
        ({"rule": "mgda", "every_n_steps": 0}, "use 1 or more"),
        ({"rule": "mgda", "smoothing": 1.0}, "from 0 to below 1"),
        ({"rule": "prior"}, "best constant prediction"),
        ({"rule": "prior", "reference": {"kind": 1.0, "size": 0.0}}, "use losses above 0"),
        ({"rule": "priority"}, "name the main task"),
        ({"rule": "dwa", "temperature": 0.0}, "above 0"),
        ({"rule": "uncertainty", "lr": 0.0}, "above 0"),
        ({"rule": "cagrad", "c": -1.0}, "0 or more"),
        ({"rule": "torchjd", "aggregator": "NashMTL"}, "use one of AlignedMTL"),
        ({"rule": "torchjd", "aggregator_options": {"c": 1.0}}, "unexpected keyword argument"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="LossWeighting") as caught:
        LossWeighting(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("technique", "model", "message"),
    [
        (LossWeighting("priority", main="class"), Two(), "no such task; use kind, size"),
        (LossWeighting("fixed", weights={"kind": 1.0}), Two(), "give a number for each of kind, size"),
        (LossWeighting("real_time"), Two(sign=-1.0), "the loss of 'size' is -"),
        (LossWeighting("real_time"), Two("vectors"), "is a tensor (3,)"),
        (LossWeighting("real_time"), Two("later"), "tasks=['kind', 'size']"),
        (LossWeighting("real_time"), Foreign("scalar"), "tells no losses"),
        (LossWeighting("mgda", gradients="features"), Foreign(), "has no task_losses(features, batch)"),
    ],
)
def test_wrong_modules(technique: LossWeighting, model: pl.LightningModule, message: str) -> None:
    with pytest.raises(InputError, match="LossWeighting") as caught:
        fit(technique, model=model)
    assert message in str(caught.value)


@pytest.mark.parametrize("rule", ["fixed", "random", "gradient_norm", "mgda", "priority"])
def test_negative_losses_are_fine_for_rules_that_take_them(rule: str) -> None:
    model, _ = fit(LossWeighting(rule, **PLAIN[rule]), model=Two(sign=-1e-3))
    assert all(p.isfinite().all() for p in model.parameters())


def test_manual_optimisation_is_refused() -> None:
    model = Two()
    model.automatic_optimization = False
    with pytest.raises(InputError, match="automatic_optimization=True"):
        fit(LossWeighting("fixed"), model=model)


def test_float16_is_refused_for_gradients() -> None:
    model = Two()
    model._trainer = type("Trainer", (), {"precision": "16-mixed", "strategy": None})()  # type: ignore[assignment]
    with pytest.raises(InputError, match="bf16-mixed"):
        LossWeighting("mgda").attach(model)
    LossWeighting("real_time").attach(model)


def test_an_option_of_another_rule_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="gamma has no effect"):
        LossWeighting("dwa", gamma=2.0)


def test_samples_of_single_tasks_are_warned_of() -> None:
    class Disjoint(Two):
        def task_losses(self, features: Tensor, batch: Tensor) -> dict[str, Tensor]:
            scores = self.head(features)
            return {"kind": scores[:2, 0].square().mean(), "size": scores[2:, 2].square().mean()}

    model = Disjoint()
    technique = LossWeighting("mgda")
    technique.attach(model)
    with pytest.warns(UserWarning, match="no sample of the batch belongs to two tasks"):
        technique.combine(model.training_step(batches()[0], 0), model)


@pytest.mark.parametrize("other", [RDrop(), FGM()])
@pytest.mark.parametrize("module", [Two, Foreign])
def test_two_passes_at_stage_3_are_refused_at_once_with_what_works(other: Any, module: type[Two]) -> None:
    """What other errors advise (task_losses, tasks=[...], another order) would end in the next refusal."""

    def attach(stage: int | None, rule: str = "gradnorm") -> None:
        model, technique = module(), LossWeighting(rule)
        strategy = SimpleNamespace(stage=stage, techniques=(other, technique))
        model._trainer = SimpleNamespace(strategy=strategy, precision="32-true")  # type: ignore[assignment]
        technique.attach(model)

    name = type(other).__name__
    with pytest.raises(InputError, match=rf"{name} runs the training step more than once, .*zero_2, or a rule by los"):
        attach(3)
    attach(2)
    attach(None)
    attach(3, "real_time")
