"""What the specs of loss weighting, label smoothing and EXACT ask for beyond the tests beside this one.

Specs: strategy_multi_task_weighting, multi_task_loss, label_smoothing, exact_accuracy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kexue.errors import InputError
from kexue.nn.losses import ExactLoss, smoothed_cross_entropy, smoothing_floor
from kexue.strategies import LossWeighting, MultiSampleDropout, SingleDevice
from kexue.strategies import loss_weighting as functions
from kexue.strategies.loss_weighting.rules import RULES, Measurement


class Tasks(pl.LightningModule):
    """Two tasks on one encoder; the second loss can be rescaled, shifted, and missing from given batches."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0, lr: float = 0.01, missing: Any = ()) -> None:
        super().__init__()
        pl.seed_everything(5, verbose=False)
        self.encoder = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)
        self.scale, self.shift, self.lr, self.missing = scale, shift, lr, dict(missing)
        self.batch_idx = 0

    def task_losses(self, features: Tensor, batch: Tensor) -> dict[str, Tensor]:
        scores = self.head(features)
        size = self.scale * (scores[:, 2] - 3 * batch.sum(1)).square().mean() + self.shift
        losses = {"kind": F.cross_entropy(scores[:, :2], (batch[:, 0] > 0).long()), "size": size}
        return {name: loss for name, loss in losses.items() if name not in self.missing.get(self.batch_idx, ())}

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        self.batch_idx = batch_idx
        features = self.encoder(batch).tanh()
        losses = self.task_losses(features, batch)
        return {"loss": sum(losses.values()) + 0 * self.head(features).sum(), "losses": losses}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def batches(count: int) -> Tensor:
    return torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(3))


def fit(module: pl.LightningModule, *techniques: Any, steps: int = 6, validation: bool = False, **options: Any) -> Any:
    """The module after one pass over `steps` batches."""
    loader: Any = DataLoader(batches(steps), batch_size=None)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options}
        trainer = pl.Trainer(strategy=SingleDevice(techniques), **options)
        trainer.fit(module, loader, loader if validation else None)
    return module


def weighting(rule: str, scale: float = 1.0, **options: Any) -> LossWeighting:
    """A technique of this rule; `scale` is that of the second loss, for what is told of it beforehand."""
    required: dict[str, Any] = {"prior": {"reference": {"kind": 0.7, "size": 36 * scale}}, "priority": {"main": "kind"}}
    return LossWeighting(rule, **required.get(rule, {}), **options)


def bound(rule: str) -> Any:
    """A rule that knows its tasks, a and b."""
    required: dict[str, Any] = {"prior": {"reference": {"a": 1.0, "b": 1.0}}, "priority": {"main": ["a", "b"]}}
    made = RULES[rule](**required.get(rule, {}))
    made.bind(["a", "b"])
    return made


def vector(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def update(rule: str, scale: float = 1.0, shift: float = 0.0, steps: int = 1) -> Tensor:
    """How far the encoder, which both tasks share, moves."""
    return vector(fit(Tasks(scale, shift), weighting(rule, scale), steps=steps).encoder) - vector(Tasks().encoder)


# Invariance


@pytest.mark.parametrize(
    ("rule", "change", "same"),
    [
        *((rule, {"scale": 1000.0}, True) for rule in ("initial", "prior", "real_time", "gradient_norm")),
        *((rule, {"shift": 64.0}, True) for rule, kind in RULES.items() if kind.uses_gradients and rule != "gradnorm"),
        *((rule, {"shift": 64.0}, False) for rule in ("initial", "real_time", "geometric_mean", "generalised_mean")),
    ],
)
def test_updates_after_rescaling_or_shifting_a_loss(rule: str, change: dict[str, float], same: bool) -> None:
    plain, changed = update(rule, steps=6), update(rule, steps=6, **change)
    assert ((plain - changed).norm() < 1e-4 * plain.norm()) == same


@pytest.mark.parametrize(
    ("rule", "same"),
    [
        *((rule, True) for rule in ("geometric_mean", "imtl_g")),
        *((rule, False) for rule in ("fixed", "generalised_mean", "dwa", "random", "mgda", "pcgrad", "cagrad")),
    ],
)
def test_rescaling_a_loss_leaves_the_direction_of_the_shared_update(rule: str, same: bool) -> None:
    assert (torch.cosine_similarity(update(rule), update(rule, scale=1000.0), dim=0) > 1 - 1e-6) == same


@pytest.mark.parametrize("rule", ["uncertainty", "imtl_l", "gradnorm"])
def test_settled_scores_make_up_for_a_scale(rule: str) -> None:
    shares = []
    for scale in (1.0, 1000.0):
        learned, losses = bound(rule), torch.tensor([0.5, 2.0 * scale], dtype=torch.float64)
        gram = torch.diag(torch.tensor([1.0, scale], dtype=torch.float64)).square()
        weights = torch.stack([learned.weigh(Measurement(losses, gram)) for _ in range(800)])[-100:].mean(0)
        shares.append((weights * gram.diagonal().sqrt()).tolist())
    before, after = shares
    if rule == "gradnorm":  # whose weights sum to T: the direction remains, its length does not
        before, after = ([value / sum(share) for value in share] for share in shares)
    assert after == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"random"}))
def test_equal_losses_and_orthogonal_equal_gradients_get_equal_weights(rule: str) -> None:
    made, losses = bound(rule), torch.tensor([3.0, 3.0], dtype=torch.float64)
    for step in range(3):
        first, second = made.weigh(Measurement(losses, 4 * torch.eye(2, dtype=torch.float64), step, step)).tolist()
        assert first == pytest.approx(second, rel=1e-9)
        assert first > 0


@pytest.mark.parametrize("rule", RULES)
def test_one_task_is_plain_training(rule: str) -> None:
    options: dict[str, Any] = {"prior": {"reference": {"kind": 0.7}}, "priority": {"main": "kind"}}
    technique = LossWeighting(rule, **options.get(rule, {}))
    start, missing = vector(Tasks()), {0: ["size"]}
    plain = vector(fit(Tasks(missing=missing), steps=1)) - start
    ours = vector(fit(Tasks(missing=missing), technique, steps=1)) - start
    assert torch.cosine_similarity(plain, ours, dim=0) > 1 - 1e-5
    if rule in ("fixed", "dwa", "random", "mgda", "pcgrad", "imtl_g", "gradnorm", "priority", "torchjd"):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)


# Losses that are missing, 0, negative; gradients of 0


def heads(rule: str, missing: dict[int, list[str]]) -> list[Tensor]:
    """The head after each batch."""

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            found.append(module.head.weight.detach().clone())

    found: list[Tensor] = []
    module = fit(Tasks(missing=missing), weighting(rule), callbacks=[Watch()])
    assert vector(module).isfinite().all()
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_task_that_a_batch_lacks_gets_no_step_and_breaks_none(rule: str) -> None:
    found = heads(rule, {1: ["size"], 3: ["kind"]})
    assert torch.equal(found[1][2], found[0][2])
    assert torch.equal(found[3][:2], found[2][:2])
    assert not torch.equal(found[1][:2], found[0][:2])
    assert rule == "priority" or not torch.equal(found[3][2], found[2][2])  # an auxiliary that opposes nothing


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_without_any_task_changes_nothing(rule: str) -> None:
    found = heads(rule, {2: ["kind", "size"]})
    assert torch.equal(found[2], found[1])
    assert not torch.equal(found[3], found[2])


@pytest.mark.parametrize("rule", ["mgda", "gradnorm"])
def test_the_first_batch_may_lack_a_task_where_gradients_are_those_of_parameters(rule: str) -> None:
    technique = weighting(rule, tasks=["kind", "size"], gradients="parameters")
    assert vector(fit(Tasks(missing={0: ["size"]}), technique)).isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_a_loss_of_zero_is_no_division_by_zero(rule: str) -> None:
    assert vector(fit(Tasks(scale=0.0), weighting(rule))).isfinite().all()


TAKES_ANY = {"fixed", "prior", "random", "gradient_norm", "mgda", "pcgrad", "cagrad", "imtl_g", "priority", "torchjd"}


@pytest.mark.parametrize("rule", RULES)
def test_negative_losses_train_or_are_refused(rule: str) -> None:
    module = Tasks(scale=-1.0, lr=1e-4)
    if rule in TAKES_ANY:
        assert vector(fit(module, weighting(rule))).isfinite().all()
    else:
        with pytest.raises(InputError, match=rf"LossWeighting\('{rule}'\): the loss of 'size' is -"):
            fit(module, weighting(rule))


def test_the_geometric_mean_of_many_small_losses_does_not_underflow() -> None:
    losses = torch.full((16,), 1e-30, requires_grad=True)
    mean = functions.generalised_mean(losses, 0.0)
    assert mean.item() == pytest.approx(1e-30, rel=1e-4)
    assert torch.autograd.grad(mean, losses)[0].tolist() == pytest.approx([1 / 16] * 16, rel=1e-4)


@pytest.mark.parametrize(
    "rule",
    RULES,
)
def test_heads_that_start_with_zeros_learn(rule: str) -> None:
    """Their gradient for the features is 0 until they have moved, as the analytic initial losses have it."""
    module = Tasks()
    nn.init.zeros_(module.head.weight)
    fit(module, weighting(rule))
    assert module.head.weight.isfinite().all()
    assert module.head.weight[:2].any()


GRADIENT_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient_norm": functions.gradient_norm_weights,
    "gradient_norm, keep_length": lambda gram: functions.gradient_norm_weights(gram, keep_length=True),
    "mgda": functions.min_norm_weights,
    "pcgrad": lambda gram: functions.pcgrad_weights(gram, torch.Generator().manual_seed(0)),
    "cagrad": functions.cagrad_weights,
    "imtl_g": functions.imtl_g_weights,
}


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_weights_are_finite_where_all_gradients_are_zero(rule: str) -> None:
    assert GRADIENT_RULES[rule](torch.zeros(3, 3, dtype=torch.float64)).isfinite().all()


def test_opposed_gradients_have_equal_projections_on_zero() -> None:
    rows = torch.tensor([[1.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)
    weights = functions.imtl_g_weights(rows @ rows.T)
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.25], dtype=torch.float64))


@pytest.mark.parametrize("gradients", ["features", "parameters"])
def test_a_frozen_encoder_is_explained(gradients: Any) -> None:
    module = Tasks()
    module.encoder.requires_grad_(False)
    with pytest.raises(InputError, match=r"LossWeighting\('mgda'"):
        fit(module, weighting("mgda", gradients=gradients))


# In a run


def test_weights_are_those_of_each_batch_in_a_window_of_accumulated_ones() -> None:
    module = Tasks()
    optimizer = module.configure_optimizers()
    for index, batch in enumerate(batches(4)):
        features = module.encoder(batch).tanh()
        losses = list(module.task_losses(features, batch).values())
        rows = torch.stack([torch.autograd.grad(x, features, retain_graph=True)[0].flatten() for x in losses]).double()
        weights = functions.min_norm_weights(rows @ rows.T)
        (sum(w.item() * x for w, x in zip(weights, losses, strict=True)) / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    ours = fit(Tasks(), weighting("mgda"), steps=4, accumulate_grad_batches=2)
    torch.testing.assert_close(vector(ours), vector(module), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["real_time", "mgda"])
def test_validation_between_batches_is_none_of_its_business(rule: str) -> None:
    class Validated(Tasks):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return sum(self.task_losses(self.encoder(batch).tanh(), batch).values())  # known by task_losses alone

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            losses = self.task_losses(self.encoder(batch).tanh(), batch)
            self.log("val/loss", sum(losses.values()))

    plain, validated = (
        fit(Validated(), weighting(rule), validation=validation, val_check_interval=1 if validation else None)
        for validation in (False, True)
    )
    assert torch.equal(vector(plain), vector(validated))


@pytest.mark.parametrize("rule", ["fixed", "mgda", "pcgrad"])
def test_samples_of_a_dropped_head_are_one_task(rule: str) -> None:
    """Where next to nothing is dropped, the mean over samples is the loss of one, and so are its weights."""
    one, three = fit(Tasks(), weighting(rule)), fit(Tasks(), MultiSampleDropout(3, 1e-9), weighting(rule))
    torch.testing.assert_close(vector(three), vector(one), rtol=1e-4, atol=1e-6)


# Label smoothing and EXACT


def test_smoothing_bounds_the_confidence_at_no_cost_of_accuracy() -> None:
    """Of a convex problem that can fit every item: scores on random features of digits."""
    data = load_digits()
    x, y = torch.tensor(data.data) / 16, torch.tensor(data.target)
    correct = torch.zeros(2, 3)
    for row, smoothing in enumerate((0.0, 0.1)):
        for seed in range(3):
            torch.manual_seed(seed)
            features = (x @ torch.randn(64, 400, dtype=torch.float64) / 8).relu()
            scores = features @ fitted(features[:60], y[:60], smoothing)
            assert (scores[:60].softmax(-1).max() <= 1 - 0.1 + 0.1 / 10 + 0.01) == (smoothing > 0)
            assert smoothed_cross_entropy(scores[:60], y[:60], smoothing) > smoothing_floor(10, smoothing)
            correct[row, seed] = (scores[60:].argmax(-1) == y[60:]).float().mean()
    assert correct[1].mean() >= correct[0].mean() - correct[0].std()


def fitted(features: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """The weights of a linear layer that has learned its items."""

    def slope() -> Tensor:
        weight.grad = None
        loss = smoothed_cross_entropy(features @ weight, target, smoothing)
        loss.backward()
        return loss

    weight = torch.zeros(features.shape[1], 10, dtype=torch.float64, requires_grad=True)
    torch.optim.LBFGS([weight], max_iter=80, line_search_fn="strong_wolfe").step(slope)  # type: ignore[arg-type]
    return weight.detach()


def test_a_smoothed_loss_less_its_floor_can_be_weighed() -> None:
    for shift in range(20):
        scores = torch.full((1, 3), 0.37 * shift)
        scores[0, 0] += math.log1p(3 * 0.9 / 0.1)  # the best there are
        loss = smoothed_cross_entropy(scores.requires_grad_(), torch.tensor([0]), 0.1) - smoothing_floor(3, 0.1)
        assert abs(loss.item()) < 1e-5
        combined = LossWeighting("real_time").combine({"loss": loss, "losses": {"a": loss}}, Tasks())
        assert combined["loss"].isfinite()


def test_a_prior_is_spread_over_the_classes_that_an_item_may_have() -> None:
    torch.manual_seed(0)
    scores, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    prior = torch.tensor([0.4, 0.2, 0.1, 0.2, 0.1], dtype=torch.float64)
    masked = smoothed_cross_entropy(scores, target, 0.2, prior=prior, class_mask=torch.arange(5) < 3)
    few = smoothed_cross_entropy(scores[:, :3], target, 0.2, prior=prior[:3] / prior[:3].sum())
    torch.testing.assert_close(masked, few, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prior", [None, [0.4, 0.3, 0.2, 0.1]])
def test_padding_may_have_no_class_at_all(prior: Any) -> None:
    torch.manual_seed(0)
    scores, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, -100])
    mask = torch.tensor([[True, True, False, True], [True] * 4, [False] * 4])
    loss = smoothed_cross_entropy(scores, target, prior=prior, class_mask=mask)
    expected = smoothed_cross_entropy(scores[:2], target[:2], prior=prior, class_mask=mask[:2])
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, scores)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0])


def test_exact_draws_nothing() -> None:
    torch.manual_seed(0)
    scores, target = torch.randn(7, 4), torch.randint(4, (7,))
    state = torch.get_rng_state()
    first = ExactLoss(0.7)(scores, target)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(ExactLoss(0.7)(scores, target), first)


@pytest.mark.parametrize("target", [[1], [2, 2, 2, 2]])
def test_exact_of_one_item_or_of_items_of_one_class(target: list[int]) -> None:
    torch.manual_seed(0)
    scores = torch.randn(len(target), 3, requires_grad=True)
    loss = ExactLoss()(scores, torch.tensor(target))
    assert 0 < loss.item() < 1
    assert torch.autograd.grad(loss, scores)[0].abs().max() < torch.inf
