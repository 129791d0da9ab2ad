"""FGM: the formula by hand in float64, which embedding it finds, and what it leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cells import MODULES, loader
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kexue.errors import InputError
from kexue.nn.transformer import Transformer, TransformerConfig
from kexue.strategies import (
    FGM,
    ActivationCheckpointing,
    SingleDevice,
    Technique,
    fgm_perturbation,
    find_embeddings,
    perturbed,
    recorded,
)


class Bag(pl.LightningModule):
    """Mean of embedding vectors and a linear layer: small enough for derivatives by hand."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4).double()
        self.embed.requires_grad_(not frozen)
        self.out = nn.Linear(4, 3).double()
        self.logged: list[tuple[str, float]] = []

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        self.logged.append((name, float(value)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        logits = self.out(self.embed(batch["ids"]).mean(1))
        loss = F.cross_entropy(logits, batch["labels"])
        self.log("train/loss", loss.detach())
        return {"loss": loss, "losses": {"label": loss, "size": logits.square().mean()}, "logits": logits}


def fit(model: pl.LightningModule, *techniques: Technique) -> None:
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
    trainer.fit(model, loader(0, 1, 8, 4))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"ids": torch.randint(0, 9, (5, 6)), "labels": torch.randint(0, 3, (5,))}


def by_hand(model: Bag, batch: dict[str, Tensor], epsilon: float) -> tuple[Tensor, Tensor]:
    """Loss and adversarial loss; d loss / d vector(b, t) = W^T (softmax - one hot) / (B T)."""
    vectors = model.embed(batch["ids"])
    logits = model.out(vectors.mean(1))
    error = (logits.softmax(-1) - F.one_hot(batch["labels"], 3)).detach()
    gradient = (error @ model.out.weight.detach() / math.prod(batch["ids"].shape))[:, None].expand_as(vectors)
    moved = vectors + epsilon * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
    return F.cross_entropy(logits, batch["labels"]), F.cross_entropy(model.out(moved.mean(1)), batch["labels"])


@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_loss_and_gradients_are_those_of_the_formula(epsilon: float, batch: dict[str, Tensor]) -> None:
    torch.manual_seed(1)
    plain = Bag()
    model = copy.deepcopy(plain)
    technique = FGM(epsilon)
    technique.attach(model)
    outputs = model.training_step(batch, 0)
    loss, adversarial = by_hand(plain, batch, epsilon)
    assert outputs["loss"].item() == pytest.approx((loss + adversarial).item(), abs=1e-12)
    assert outputs["losses"]["label"].item() == outputs["loss"].item()
    assert adversarial > loss
    outputs["loss"].backward()
    (loss + adversarial).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
    # What the module logs is its first pass; the second is logged under a name of its own.
    assert model.logged == [
        ("train/loss", pytest.approx(loss.item())),
        ("train/adversarial_loss", pytest.approx(adversarial.item())),
    ]
    technique.detach(model)
    assert "training_step" not in vars(model)
    assert not model.embed._forward_hooks


def test_the_same_in_a_bare_loop(batch: dict[str, Tensor]) -> None:
    model = Bag()
    with recorded([model.embed]) as vectors:
        loss = model.training_step(batch, 0)["loss"]
    gradients = torch.autograd.grad(loss, vectors, retain_graph=True)
    with perturbed([model.embed], [fgm_perturbation(gradient, 0.3) for gradient in gradients]):
        adversarial = model.training_step(batch, 0)["loss"]
    assert adversarial.item() == pytest.approx(by_hand(model, batch, 0.3)[1].item(), abs=1e-12)


def test_every_example_moves_by_epsilon_and_none_knows_of_the_others() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(4, 6, 8) * torch.tensor([1.0, 1e-20, 0.0, 1.0])[:, None, None]
    gradient[3, 0, 0] = torch.inf
    moved = fgm_perturbation(gradient, 0.7)
    assert moved.flatten(1).norm(dim=1).tolist() == pytest.approx([0.7, 0.7, 0.0, 0.0])
    assert torch.equal(fgm_perturbation(gradient[:1], 0.7), moved[:1])
    half = fgm_perturbation(torch.full((2, 300, 300), 3e-4, dtype=torch.float16), 1.0)
    assert half.dtype == torch.float16
    assert half.float().flatten(1).norm(dim=1).tolist() == pytest.approx([1.0, 1.0], rel=1e-2)


def test_a_frozen_table_is_perturbed_too(batch: dict[str, Tensor]) -> None:
    model = Bag(frozen=True)
    FGM(0.5).attach(model)
    loss, adversarial = by_hand(model, batch, 0.5)
    outputs = model.training_step(batch, 0)
    assert outputs["loss"].item() == pytest.approx((loss + adversarial).item(), abs=1e-12)
    outputs["loss"].backward()
    assert model.embed.weight.grad is None


def test_a_table_that_is_also_the_output_layer_is_perturbed_as_input_only() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(50, dim=8, num_layers=1, num_heads=2, feedforward_dim=16, dropout=0.0, heads=("lm",))
    net, ids = Transformer(config), torch.randint(0, 50, (2, 5))
    tables = find_embeddings(net)
    with recorded(tables) as vectors:
        logits = net.logits(net(ids))
    assert [tuple(vector.shape) for vector in vectors] == [(2, 5, 8)]
    with perturbed(tables, [torch.ones_like(vectors[0])]):
        moved = net.logits(net(ids))
    assert moved.shape == logits.shape
    assert not torch.equal(moved, logits)
    assert torch.equal(net.logits(net(ids)), logits)


@pytest.mark.parametrize("module", ["plain", "shared", "bert"])
def test_the_table_of_tokens_is_found(module: str) -> None:
    model = MODULES[module]()
    (table,) = find_embeddings(model)
    assert isinstance(table, nn.Embedding)
    assert table.num_embeddings == 50
    assert find_embeddings(model, "*word_embeddings" if module == "bert" else "embed") == [table]


@pytest.mark.parametrize(
    ("make", "pattern", "message"),
    [
        (lambda: nn.Linear(3, 3), None, "Linear has no nn.Embedding; FGM is for models of token ids"),
        (lambda: nn.ModuleDict({"source": nn.Embedding(9, 2), "target": nn.Embedding(9, 2)}), None, "source, target"),
        (Bag, "token*", "nothing has this name in Bag; name the embedding of the tokens, one of embed"),
    ],
)
def test_a_table_that_cannot_be_told_is_asked_for(make: Callable[[], nn.Module], pattern: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_embeddings(make(), pattern)


def test_a_module_that_calls_no_embedding_is_told() -> None:
    class Direct(Bag):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.out(self.embed.weight[batch["ids"]].mean(1)), batch["labels"])

    model = Direct()
    FGM().attach(model)
    with pytest.raises(InputError, match="called no embedding with token ids"):
        model.training_step({"ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.zeros(2).long()}, 0)


def test_manual_optimisation_and_wrong_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="automatic_optimization=True"):
        FGM().attach(MODULES["manual"]())
    with pytest.raises(ValueError, match=r"FGM\(epsilon=0\): use a number above 0"):
        FGM(0)


def test_a_fit_with_a_step_of_one_argument() -> None:
    """Lightning asks the signature whether to pass batch_idx; the second fit shows that everything came off."""

    class Short(MODULES["plain"]):
        def training_step(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return super().training_step(batch, 0)

    torch.manual_seed(0)
    model = Short(optimizer="sgd")
    for passes in (2, 1):
        model.losses.clear()
        fit(model, *[FGM(0.5)] * (passes - 1))
        assert len(model.losses) == 2 * passes
        assert (model.losses[1] > model.losses[0]) == (passes == 2)


def test_it_stays_beside_a_technique_that_combines() -> None:
    class Halve(Technique):
        def combine(self, outputs: Any, module: pl.LightningModule) -> Any:
            return outputs / 2

    model = MODULES["plain"](optimizer="sgd")
    fit(model, FGM(0.5), Halve())
    assert len(model.losses) == 4


def test_cost_in_flops_and_with_recomputation() -> None:
    """A plain step is three forward passes' worth; FGM two forward, one to the vectors, two full backward: 7 / 3."""
    torch.manual_seed(0)
    batch = {"ids": torch.randint(3, 50, (4, 6)), "labels": torch.randint(0, 3, (4,))}
    model = MODULES["plain"]()

    def flops() -> int:
        model.zero_grad()
        with FlopCounterMode(display=False) as counter:
            model.training_step(batch, 0).backward()
        return counter.get_total_flops()

    plain = flops()
    technique = FGM(0.5)
    technique.attach(model)
    assert flops() / plain == pytest.approx(7 / 3, rel=0.02)
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    recompute = ActivationCheckpointing()
    recompute.attach(model)
    flops()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
