"""R-Drop: the divergences written plainly, two passes with masks of their own, and what it asks of a module."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from cells import MODULES
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kexue.errors import InputError
from kexue.strategies import RDrop, symmetric_kl


class Dropped(pl.LightningModule):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        logits = self(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        return {"loss": loss, "logits": logits, "losses": {"label": loss}}


def batch_of(rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 6, generator=generator).double(), torch.randint(0, 3, (rows,), generator=generator)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def test_divergence_is_the_mean_of_both_directions() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 3).double()
    p, q = first.softmax(-1), second.softmax(-1)
    plain = (kl(p, q) + kl(q, p)) / 2
    torch.testing.assert_close(symmetric_kl(first, second), plain.mean())
    torch.testing.assert_close(symmetric_kl(second, first), plain.mean())
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    torch.testing.assert_close(symmetric_kl(first, second, mask), plain[mask].mean())
    assert symmetric_kl(first, first).item() == 0
    assert symmetric_kl(first, second, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_divergence_is_finite_in_half_precision_and_with_masked_classes(dtype: torch.dtype) -> None:
    first, second = torch.randn(4, 5).to(dtype), torch.randn(4, 5).to(dtype)
    for logits in (first, second):
        logits[:, 2] = torch.finfo(dtype).min
    found = symmetric_kl(first.requires_grad_(), second)
    found.backward()
    assert found.dtype == torch.float32
    assert found.isfinite()
    assert first.grad is not None
    assert first.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.0])
def test_loss_is_the_mean_of_two_passes_and_alpha_times_the_divergence(alpha: float) -> None:
    torch.manual_seed(0)
    model, batch = Dropped(), batch_of()
    torch.manual_seed(1)
    first, second = model(batch[0]), model(batch[0])
    assert not torch.equal(first, second)
    p, q = first.softmax(-1), second.softmax(-1)
    likelihood = (F.nll_loss(p.log(), batch[1]) + F.nll_loss(q.log(), batch[1])) / 2
    expected = likelihood + alpha * (kl(p, q) + kl(q, p)).mean() / 2
    RDrop(alpha).attach(model)
    torch.manual_seed(1)
    outputs = model.training_step(batch, 0)
    torch.testing.assert_close(outputs["loss"], expected, rtol=0, atol=1e-12)
    # The loss is still the sum of its parts, for what weighs them.
    torch.testing.assert_close(sum(outputs["losses"].values()), expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(outputs["loss"], list(model.parameters()))
    for a, b in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_without_dropout_it_is_the_plain_loss_at_twice_the_cost() -> None:
    model, batch = Dropped(p=0.0), batch_of()
    with FlopCounterMode(display=False) as once:
        plain = model.training_step(batch, 0)["loss"]
        plain.backward()
    technique = RDrop(4.0)
    technique.attach(model)
    with FlopCounterMode(display=False) as twice:
        loss = model.training_step(batch, 0)["loss"]
        loss.backward()
    torch.testing.assert_close(loss, plain)
    assert twice.get_total_flops() == 2 * once.get_total_flops()
    technique.detach(model)
    assert "training_step" not in vars(model)


def test_places_that_do_not_count_are_left_out() -> None:
    class Tagged(Dropped):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {**super().training_step(batch, batch_idx), "mask": torch.tensor([1, 1, 0, 0, 0])}

    torch.manual_seed(0)
    model, batch = Tagged(), batch_of()
    torch.manual_seed(1)
    first, second = model(batch[0]), model(batch[0])
    RDrop(1.0).attach(model)
    torch.manual_seed(1)
    torch.testing.assert_close(model.training_step(batch, 0)["losses"]["r_drop"], symmetric_kl(first[:2], second[:2]))


def test_what_cannot_work_says_so() -> None:
    model = MODULES["plain"]()
    RDrop().attach(model)
    batch = {"ids": torch.ones(2, 6, dtype=torch.long), "labels": torch.zeros(2).long()}
    with pytest.raises(InputError, match=r'PlainModule returns no logits; let it return \{"loss": loss, "logits"'):
        model.training_step(batch, 0)
    with pytest.raises(InputError, match="RDrop: ManualModule steps its optimiser"):
        RDrop().attach(MODULES["manual"]())
    with pytest.raises(ValueError, match=r"RDrop\(alpha=-1\): use 0 or more"):
        RDrop(-1)
