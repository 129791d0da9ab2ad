"""Multi-sample dropout: the statistics that it promises, the head found and left as it was, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from kexue.errors import InputError
from kexue.lightning_modules.imaging.digits_multitask import DigitsMultitaskModule
from kexue.strategies import MultiSampleDropout, SingleDevice, multi_sample_dropout, multi_sample_loss
from kexue.strategies.multi_sample_dropout import Reduction

SHAPES = [(6, 8), (3, 5, 8), (2, 4, 3, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_call_draws_the_masks_of_as_many_plain_dropouts(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape)
    torch.manual_seed(1)
    expected = torch.cat([F.dropout(features, 0.5) for _ in range(4)])
    torch.manual_seed(1)
    assert torch.equal(multi_sample_dropout(features, 4, 0.5), expected)
    torch.manual_seed(1)
    one = F.dropout(features, 0.5)
    torch.manual_seed(1)
    assert torch.equal(multi_sample_dropout(features, 1, 0.5), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [False, True])
def test_masks_of_samples_are_independent_and_keep_the_mean(own: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1) if own else None
    dropped = multi_sample_dropout(torch.ones(400, 50, dtype=dtype), 4, 0.3, generator)
    kept = (dropped > 0).double().view(4, -1)
    assert kept.mean(1).tolist() == pytest.approx([0.7] * 4, abs=0.02)
    assert (torch.corrcoef(kept) - torch.eye(4)).abs().max() < 0.04
    # Nor do neighbours know of each other, which share the words that the bits come from.
    columns = kept.view(4 * 400, 50)
    assert (torch.corrcoef(columns.T) - torch.eye(50)).abs().max() < 0.13
    assert dropped.dtype == dtype


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.75, 1 - 1e-9])
def test_the_expectation_is_exact_whatever_the_bits_can_say(p: float) -> None:
    """The share that stays is a multiple of 2 ** -16, and what stays is divided by just that share."""
    dropped = multi_sample_dropout(torch.ones(7, 9), 3000, p, torch.Generator().manual_seed(0))
    values = set(dropped.double().unique().tolist())
    (scale,) = values - {0.0}
    assert 2**16 / scale == pytest.approx(round(2**16 / scale), rel=1e-6)
    assert abs(1 / scale - (1 - p)) <= 2**-16
    assert (0.0 in values) == (1 / scale < 1)


@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_without_dropout_every_reduction_is_the_plain_loss(reduction: Any) -> None:
    torch.manual_seed(0)
    features, target, head = torch.randn(6, 8).double(), torch.randint(0, 3, (6,)), nn.Linear(8, 3).double()
    plain = F.cross_entropy(head(features), target)
    for samples in (1, 3, 8):
        logits = head(multi_sample_dropout(features, samples, 0.0))
        torch.testing.assert_close(multi_sample_loss(F.cross_entropy, logits, target, reduction), plain)


def test_the_reductions_are_what_they_say() -> None:
    torch.manual_seed(0)
    samples, target = torch.randn(5, 4, 3), torch.tensor([0, 2, -100, 1])
    logits = samples.flatten(0, 1).to(torch.bfloat16)
    samples = logits.float().view(5, 4, 3)
    mean_loss = torch.stack([F.cross_entropy(sample, target) for sample in samples]).mean()
    mean_prob = F.nll_loss(samples.softmax(-1).mean(0).log(), target)
    found = {
        r: multi_sample_loss(F.cross_entropy, logits, target, r) for r in ("mean_loss", "mean_logits", "mean_prob")
    }
    torch.testing.assert_close(found["mean_loss"], mean_loss)
    torch.testing.assert_close(found["mean_logits"], F.cross_entropy(samples.mean(0), target))
    torch.testing.assert_close(found["mean_prob"], mean_prob)
    assert found["mean_loss"] > found["mean_prob"]  # both by Jensen
    assert found["mean_loss"] > found["mean_logits"]


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: F.cross_entropy(z, F.one_hot(y, 3).float() * 0.8 + 0.1),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z))),  # rows of a batch against each other
    ],
    ids=["sum", "soft_labels", "smoothing", "in_batch"],
)
def test_any_loss_over_a_batch_keeps_its_meaning(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(multi_sample_loss(loss_fn, logits.repeat(5, 1), target), loss_fn(logits, target))


def test_gradients_keep_their_mean_and_have_an_eighth_of_the_variance() -> None:
    """And the defect of a well-known copy, which takes the loss of samples 2..M on features, would show."""
    torch.manual_seed(0)
    features, target = torch.randn(16, 12), torch.randint(0, 4, (16,))
    head = nn.Linear(12, 4)

    def gradients(samples: int, draws: int, defect: bool = False) -> Tensor:
        found = []
        for _ in range(draws):
            head.zero_grad()
            dropped = multi_sample_dropout(features, samples, 0.5)
            loss = multi_sample_loss(F.cross_entropy, head(dropped), target)
            if defect:
                first = head(dropped[:16])
                others = [F.cross_entropy(sample, target) for sample in dropped[16:].view(samples - 1, 16, 12)]
                loss = torch.stack([F.cross_entropy(first, target), *others]).mean()
            loss.backward()
            assert head.weight.grad is not None
            found.append(head.weight.grad.flatten().clone())
        return torch.stack(found)

    plain, several = gradients(1, 8000), gradients(8, 2000)
    error = (plain.var(0) / 8000 + several.var(0) / 2000).sqrt()
    assert ((plain.mean(0) - several.mean(0)).abs() < 4.5 * error).all()
    assert float(plain.var(0).sum() / several.var(0).sum()) == pytest.approx(8, rel=0.1)
    assert float(gradients(8, 200, defect=True).mean(0).norm() / plain.mean(0).norm()) < 0.3


def test_mean_logits_of_a_linear_head_approach_no_dropout() -> None:
    torch.manual_seed(0)
    features, head = torch.randn(1, 30), nn.Linear(30, 1)
    dropped = multi_sample_dropout(features.expand(4000, -1), 8, 0.4).view(8, 4000, 30)
    logits = head(dropped).mean(0)
    torch.testing.assert_close(logits, head(dropped.mean(0)), rtol=1e-4, atol=1e-5)
    expected = (head.weight * features).square().sum() * (0.4 / 0.6) / 8
    assert logits.var().item() == pytest.approx(expected.item(), rel=0.1)


# The technique, on modules that know nothing of it


class Tagger(pl.LightningModule):
    """A trunk and a head under a name of its own; `forward` counts what runs."""

    def __init__(self, head: nn.Module | None = None, call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.classifier = head or nn.Linear(8, 3)
        self.call = call or (lambda head, hidden: head(hidden))
        self.trunk_calls = 0
        self.head_rows: list[int] = []
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Any:
        self.trunk_calls += 1
        return self.call(self.classifier, torch.tanh(self.trunk(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        output = self(x)
        loss = F.cross_entropy(output[0] if isinstance(output, tuple) else output, y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Contract(Tagger):
    """The same with `head` and `task_losses`, as kexue's modules have them."""

    @property
    def head(self) -> nn.Module:
        return self.classifier

    def task_losses(self, features: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"sum": F.cross_entropy(self.head(features), batch[1], reduction="sum"), "size": features.abs().mean()}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.trunk_calls += 1
        losses = self.task_losses(torch.tanh(self.trunk(batch[0])), batch)
        return {"loss": losses["sum"], "losses": losses}


def batch_of(rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def fit(model: pl.LightningModule, *techniques: Any, batches: int = 2) -> pl.LightningModule:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=SingleDevice(techniques),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    x, y = batch_of(4 * batches)
    rows = list(zip(x, y, strict=True))
    trainer.fit(model, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("kind", [Tagger, Contract])
def test_names_evaluation_and_trunk_stay_as_they_are(kind: type[Tagger]) -> None:
    torch.manual_seed(0)
    plain = kind()
    model = copy.deepcopy(plain)
    technique = MultiSampleDropout(8, 0.5, head="classifier" if kind is Tagger else None)
    technique.attach(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    batch = batch_of()
    with FlopCounterMode(display=False) as counter:
        model.training_step(batch, 0)
    assert model.trunk_calls == 1
    assert counter.get_total_flops() == 2 * 4 * 6 * 8 + 8 * (2 * 4 * 8 * 3)
    model.eval()
    plain.eval()
    assert torch.equal(model(batch[0]), plain(batch[0]))
    features = torch.randn(4, 8)
    before = torch.get_rng_state()
    if isinstance(model, Contract) and isinstance(plain, Contract):
        assert model.task_losses(features, batch) == plain.task_losses(features, batch)
    model(batch[0])
    assert torch.equal(torch.get_rng_state(), before)  # no mask was drawn
    technique.detach(model)
    assert not {"training_step", "task_losses"} & set(vars(model))
    assert not model.classifier._forward_hooks
    assert not model.classifier._forward_pre_hooks


def test_losses_are_averaged_over_samples_by_the_modules_own_rule() -> None:
    torch.manual_seed(0)
    model = Contract()
    technique = MultiSampleDropout(6, 0.5)
    technique.attach(model)
    batch = batch_of()
    torch.manual_seed(5)
    found = model.training_step(batch, 0)["losses"]
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    features = torch.tanh(model.trunk(batch[0]))
    samples = multi_sample_dropout(features, 6, 0.5, generator).view(6, 4, 8)
    expected = sum(F.cross_entropy(model.classifier(sample), batch[1], reduction="sum") for sample in samples) / 6
    torch.testing.assert_close(found["sum"], expected)
    torch.testing.assert_close(found["size"], samples.abs().mean())


@pytest.mark.parametrize("reduction", [None, "mean_logits", "mean_prob"])
def test_a_named_head_gives_the_mean_of_its_outputs(reduction: Any) -> None:
    torch.manual_seed(0)
    model = Tagger()
    MultiSampleDropout(6, 0.5, head="class*", reduction=reduction).attach(model)
    x, _ = batch_of()
    torch.manual_seed(5)
    found = model(x)
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    samples = multi_sample_dropout(torch.tanh(model.trunk(x)), 6, 0.5, generator).view(6, 4, 8)
    logits = F.linear(samples, model.classifier.weight, model.classifier.bias)  # type: ignore[arg-type]
    expected = logits.softmax(-1).mean(0).log() if reduction == "mean_prob" else logits.mean(0)
    torch.testing.assert_close(found, expected)


class WithMask(nn.Module):
    """A head that takes more than features, and returns more than scores."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, hidden: Tensor, *rest: Any, scale: float = 1.0, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        assert mask is None or len(mask) == len(hidden)
        assert all(len(value) in (1, len(hidden)) for value in rest)
        shown = hidden if mask is None else hidden * mask[:, None]
        return self.linear(shown * scale), shown


def test_other_arguments_with_a_batch_are_repeated() -> None:
    mask, table, number = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.ones(1, 8), torch.tensor(2.0)
    model = Tagger(WithMask(), lambda head, h: head(h, table, scale=0.5, mask=mask) if number else None)
    MultiSampleDropout(5, 0.5, head="classifier").attach(model)
    scores, shown = model(batch_of()[0])
    assert (scores.shape, shown.shape) == ((4, 3), (4, 8))
    assert (shown[1::2] == 0).all()
    assert (shown[::2] != 0).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda head, h: head(h, torch.ones(7, 7)), r"also takes a tensor \(7, 7\).*the batch's 4"),
        (lambda head, h: head(h, [torch.ones(4)]), "also takes a list"),
        (lambda head, h: head(torch.arange(4)), "are not features"),
    ],
    ids=["no_batch", "list", "ids"],
)
def test_arguments_that_could_mean_anything_are_refused(call: Any, message: str) -> None:
    model = Tagger(WithMask(), call)
    MultiSampleDropout(5, 0.5, head="classifier").attach(model)
    with pytest.raises(InputError, match=message):
        model(batch_of()[0])


class NoTensor(nn.Module):
    def forward(self, hidden: Tensor) -> str:
        return "scores"


@pytest.mark.parametrize(
    ("model", "technique", "message"),
    [
        (lambda: Tagger(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))), {"head": "classifier"}, "BatchNorm"),
        (Tagger, {}, r"has no head; name it, such as MultiSampleDropout\(head='classifier'\)"),
        (Tagger, {"head": "nothing.*"}, "no module of that name"),
        (Tagger, {"reduction": "mean_loss"}, r"Tagger has no task_losses"),
        (lambda: Tagger(NoTensor()), {"head": "classifier"}, "returns a str"),
        (lambda: Tagger(call=lambda head, h: F.linear(h, head.weight)), {"head": "classifier"}, "called neither"),
    ],
    ids=["batch_norm", "no_head", "wrong_name", "no_losses", "no_tensor", "not_called"],
)
def test_what_cannot_work_says_so(model: Callable[[], Tagger], technique: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(model(), MultiSampleDropout(4, 0.5, **technique))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples=0.*1 or more"),
        ({"p": 1.0}, "p=1.0.*below 1"),
        ({"reduction": "mean"}, "use mean_loss, mean_logits"),
        ({"head": "out", "reduction": "mean_loss"}, "leave one of the two out"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiSampleDropout(**arguments)


def test_rows_that_do_not_fit_are_explained() -> None:
    with pytest.raises(InputError, match="5 rows of logits are not a multiple of 2"):
        multi_sample_loss(F.cross_entropy, torch.randn(5, 3), torch.tensor([0, 1]))


def test_a_head_inside_a_named_head_is_dropped_once() -> None:
    model = Tagger(WithMask())
    MultiSampleDropout(5, 0.5, head="classifier*").attach(model)
    assert not model.classifier.linear._forward_pre_hooks  # type: ignore[union-attr]


def test_p_of_0_is_the_plain_run_and_says_so() -> None:
    torch.manual_seed(0)
    plain = Tagger()
    model = copy.deepcopy(plain)
    fit(plain)
    with pytest.warns(UserWarning, match="drops nothing"):
        fit(model, MultiSampleDropout(8, 0.0, head="classifier"))
    assert model.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_copy_of_an_attached_module_trains_itself() -> None:
    model = Contract()
    MultiSampleDropout(2, 0.5).attach(model)
    clone = copy.deepcopy(model)
    clone.training_step(batch_of(), 0)["loss"].backward()
    assert (model.trunk_calls, clone.trunk_calls) == (0, 1)
    assert model.trunk.weight.grad is None
    assert clone.trunk.weight.grad is not None


def test_what_an_instance_held_before_is_there_again() -> None:
    model = Contract()
    own = model.task_losses = lambda features, batch: {"sum": features.sum()}
    technique = MultiSampleDropout(2, 0.5)
    technique.attach(model)
    assert model.task_losses is not own
    technique.detach(model)
    assert model.task_losses is own


def test_a_module_of_ours_trains_on_the_mean_of_losses() -> None:
    torch.manual_seed(0)
    model = DigitsMultitaskModule(channels=8, num_blocks=1, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3))
    model.configure_model()
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "image": torch.rand(1, 8, 8, generator=generator),
            "digit": torch.tensor(i % 10),
            "parity": torch.tensor(i % 2),
            "pixel_sum": torch.tensor(300.0),
        }
        for i in range(16)
    ]
    batch = next(iter(DataLoader(rows, batch_size=16)))  # type: ignore[arg-type]
    technique = MultiSampleDropout(8, 0.5)
    technique.attach(model)
    optimizer = model.configure_optimizers()
    before = after = 0.0
    for step in range(40):
        loss = model.weighted(model.task_losses(model.features(batch["image"]), batch))
        before = before or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after = loss.item() if step == 39 else after
    assert after < 0.6 * before
