"""Loss weighting beside its peers on a network with two heads: torchjd, and LibMTL's formulas written plainly.

LibMTL cannot be a requirement, since it needs torchvision: what its `weighting/*.py` (version 1.1.5) compute is written
here. Both peers set the gradient of the shared parameters alone and train every head on its own loss at weight 1,
kexue trains heads by the weighted sum; so the heads are frozen here, and the encoders have to come out equal. Other
differences: LibMTL starts UW's scores at -0.5 (ours at 0) and moves them by the model's optimiser, divides CAGrad by
`1 + c^2` unless `rescale=0`, keeps MGDA's weights of two tasks within 0.001 and 0.999, and starts GradNorm after an
epoch, from its mean losses (ours from the first batch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kexue.strategies import LossWeighting, SingleDevice
from kexue.strategies.loss_weighting import imtl_g_weights, min_norm_weights, pcgrad_weights

TASKS, BATCHES, EPOCHS, RATE = 2, 4, 4, 0.02


class TwoHeads(pl.LightningModule):
    """An encoder that trains, two heads that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 1)]).requires_grad_(False)

    def task_losses(self, features: Tensor, batch: Tensor) -> dict[str, Tensor]:
        kind = nn.functional.cross_entropy(self.heads[0](features), (batch[:, 0] > 0).long())
        size = nn.functional.mse_loss(self.heads[1](features)[:, 0], 3 * batch.sum(1))
        return {"kind": kind, "size": size}

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        losses = self.task_losses(self.encoder(batch), batch)
        return {"loss": torch.stack(list(losses.values())).sum(), "losses": losses}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.encoder.parameters(), lr=RATE)


def model() -> TwoHeads:
    pl.seed_everything(5, verbose=False)
    return TwoHeads()


def batches() -> Tensor:
    return torch.randn(BATCHES, 6, 4, generator=torch.Generator().manual_seed(3))


def ours(rule: str, **options: Any) -> Tensor:
    """The encoder that kexue trains."""
    trained = model()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=SingleDevice([LossWeighting(rule, gradients="parameters", **options)]),
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(trained, DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]
    return nn.utils.parameters_to_vector(trained.encoder.parameters()).detach()


def theirs(direction: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """The encoder that a plain loop trains, stepping against `direction(rows, losses, step)` of a peer."""
    trained = model()
    parameters = list(trained.encoder.parameters())
    optimizer = trained.configure_optimizers()
    for step in range(EPOCHS * BATCHES):
        batch = batches()[step % BATCHES]
        losses = list(trained.task_losses(trained.encoder(batch), batch).values())
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(x, parameters, retain_graph=True)]) for x in losses]
        found = direction(torch.stack(rows), torch.stack(losses).detach(), step)
        for parameter, part in zip(parameters, found.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter).clone()
        optimizer.step()
    return nn.utils.parameters_to_vector(parameters).detach()


# LibMTL


def equal(rows: Tensor, losses: Tensor, step: int) -> Tensor:
    return rows.sum(0)


def geometric(rows: Tensor, losses: Tensor, step: int) -> Tensor:
    """GLS: the gradient of prod(L)^(1/T)."""
    return losses.prod() ** (1 / TASKS) / TASKS * (rows / losses[:, None]).sum(0)


def drawn(rows: Tensor, losses: Tensor, step: int) -> Tensor:
    """RLW: a softmax of normal draws; its source is Python's global state, here that of kexue."""
    draw = torch.randn(TASKS, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return draw.softmax(0).float() @ rows


class Uw:
    """sum of L / (2 exp(s)) + s / 2, with s in an optimiser."""

    def __init__(self) -> None:
        self.s = torch.zeros(TASKS, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.s], lr=0.05, betas=(0.9, 0.9))

    def __call__(self, rows: Tensor, losses: Tensor, step: int) -> Tensor:
        found = (1 / (2 * self.s.detach().exp())) @ rows
        self.optimizer.zero_grad()
        (losses / (2 * self.s.exp()) + self.s / 2).sum().backward()
        self.optimizer.step()
        return found


class ImtlL(Uw):
    """sum of exp(s) L - s."""

    def __call__(self, rows: Tensor, losses: Tensor, step: int) -> Tensor:
        found = self.s.detach().exp() @ rows
        self.optimizer.zero_grad()
        (self.s.exp() * losses - self.s).sum().backward()
        self.optimizer.step()
        return found


class Dwa:
    """T softmax of the ratios of the last two epochs' mean losses over 2, from the third epoch on."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(EPOCHS, TASKS)

    def __call__(self, rows: Tensor, losses: Tensor, step: int) -> Tensor:
        epoch = step // BATCHES
        self.buffer[epoch] += losses / BATCHES
        if epoch < 2:
            return rows.sum(0)
        return TASKS * (self.buffer[epoch - 1] / self.buffer[epoch - 2] / 2).softmax(0) @ rows


class GradNorm:
    """|weighted norm - mean norm * relative rate^1.5|, the second part held; s in an optimiser."""

    def __init__(self) -> None:
        self.s = torch.zeros(TASKS, requires_grad=True)  # LibMTL starts at 1 each, the same softmax
        self.optimizer = torch.optim.Adam([self.s], lr=0.05, betas=(0.9, 0.9))
        self.first: Tensor | None = None

    def __call__(self, rows: Tensor, losses: Tensor, step: int) -> Tensor:
        self.first = losses if self.first is None else self.first
        scale = TASKS * self.s.softmax(0)
        norms = (scale[:, None] * rows).norm(dim=-1)
        rates = losses / self.first
        target = (norms.mean() * (rates / rates.mean()) ** 1.5).detach()
        self.optimizer.zero_grad()
        (norms - target).abs().sum().backward()
        found = scale.detach() @ rows
        self.optimizer.step()
        return found


def mgda(rows: Tensor, losses: Tensor, step: int) -> Tensor:
    """Of two tasks, in closed form."""
    a, b, c = rows[0] @ rows[0], rows[0] @ rows[1], rows[1] @ rows[1]
    gamma = 0.999 if b >= a else 0.001 if b >= c else float((c - b) / (a + c - 2 * b))
    return gamma * rows[0] + (1 - gamma) * rows[1]


def pcgrad(rows: Tensor, losses: Tensor, step: int) -> Tensor:
    changed = rows.clone()
    for i in range(TASKS):
        for j in range(TASKS):  # with two tasks the order is of no importance
            product = changed[i] @ rows[j]
            if product < 0:
                changed[i] -= product * rows[j] / rows[j].norm().pow(2)
    return changed.sum(0)


def cagrad(rows: Tensor, losses: Tensor, step: int) -> Tensor:
    gram = (rows @ rows.T).double().numpy()
    start = torch.full((TASKS,), 1 / TASKS, dtype=torch.float64).numpy()
    c = 0.4 * (gram.mean() + 1e-8) ** 0.5
    found = minimize(
        lambda x: x @ gram @ start + c * (x @ gram @ x + 1e-8) ** 0.5,
        start,
        bounds=[(0, 1)] * TASKS,
        constraints={"type": "eq", "fun": lambda x: 1 - x.sum()},
        method="SLSQP",
        options={"ftol": 1e-14},
    ).x
    worst = torch.tensor(found).float() @ rows
    return rows.mean(0) + c / (worst.norm() + 1e-8) * worst


def imtl_g(rows: Tensor, losses: Tensor, step: int) -> Tensor:
    unit = rows / rows.norm(dim=-1, keepdim=True)
    apart, between = rows[:1] - rows[1:], unit[:1] - unit[1:]
    alpha = rows[0] @ between.T @ torch.inverse(apart @ between.T)
    return torch.cat([1 - alpha.sum()[None], alpha]) @ rows


LIBMTL: dict[str, Any] = {
    "fixed": lambda: equal,
    "geometric_mean": lambda: geometric,
    "random": lambda: drawn,
    "uncertainty": Uw,
    "imtl_l": ImtlL,
    "dwa": Dwa,
    "gradnorm": GradNorm,
    "mgda": lambda: mgda,
    "pcgrad": lambda: pcgrad,
    "cagrad": lambda: cagrad,
    "imtl_g": lambda: imtl_g,
}


@pytest.mark.parametrize("rule", LIBMTL)
def test_libmtl(rule: str) -> None:
    encoder = ours(rule)
    # The solvers stop at 1e-5 to 1e-3 of a weight, or are held there.
    close = {"cagrad": 1e-4, "mgda": 2e-3}.get(rule, 2e-6)
    assert (encoder - theirs(LIBMTL[rule]())).abs().max() < close
    start = nn.utils.parameters_to_vector(model().encoder.parameters()).detach()
    assert (encoder - start).abs().max() > 20 * close


# torchjd


@pytest.mark.parametrize("tasks", [2, 3, 4, 5])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_aggregators_of_torchjd_on_random_jacobians(tasks: int, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    source = torch.Generator().manual_seed(tasks)
    scale = torch.logspace(-spread / 2, spread / 2, tasks, dtype=torch.float64)[:, None]
    rows = torch.randn(tasks, 7, generator=source, dtype=torch.float64) * scale
    gram = rows @ rows.T
    iterated = aggregation.MGDA(epsilon=1e-12, max_iters=2000)(rows)
    shortest = min_norm_weights(gram) @ rows
    assert shortest.norm() <= iterated.norm() * (1 + 1e-9)  # ours is exact, theirs comes near
    assert torch.allclose(shortest, iterated, rtol=0, atol=1e-2 * iterated.norm().item())
    assert torch.allclose(imtl_g_weights(gram) @ rows, aggregation.IMTLG()(rows), rtol=1e-6, atol=1e-9)
    orders, original = torch.Generator().manual_seed(5), torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n: original(n, generator=orders))
    projected = aggregation.PCGrad()(rows)
    monkeypatch.undo()
    own = pcgrad_weights(gram, torch.Generator().manual_seed(5)) @ rows
    assert torch.allclose(own, projected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("rule", ["fixed", "mgda", "pcgrad", "imtl_g", "torchjd"])
def test_aggregators_of_torchjd(rule: str) -> None:
    """`mtl_backward` through features, as torchjd means it to be used."""
    aggregation = pytest.importorskip("torchjd.aggregation", reason="torchjd is not installed")
    aggregator = {
        "fixed": aggregation.Sum(),
        "mgda": aggregation.MGDA(epsilon=1e-9, max_iters=2000),
        "pcgrad": aggregation.PCGrad(),
        "imtl_g": aggregation.IMTLG(),
        "torchjd": aggregation.AlignedMTL(),
    }[rule]
    assert (ours(rule) - theirs(lambda rows, losses, step: aggregator(rows.double()))).abs().max() < 5e-6


@pytest.mark.parametrize(("rule", "name"), [("geometric_mean", "GeometricMean"), ("uncertainty", "UW"), ("dwa", "DWA")])
def test_scalarisers_of_torchjd(rule: str, name: str) -> None:
    scalarization = pytest.importorskip("torchjd.scalarization", reason="torchjd is not installed")
    combine = getattr(scalarization, name)(*([TASKS] if name == "UW" else []))
    own = list(combine.parameters())
    optimizer = torch.optim.Adam(own, lr=0.05, betas=(0.9, 0.9)) if own else None

    def direction(rows: Tensor, losses: Tensor, step: int) -> Tensor:
        losses = losses.clone().requires_grad_()
        combine(losses).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if name == "DWA" and step % BATCHES == BATCHES - 1:
            combine.step()
        assert losses.grad is not None
        return losses.grad @ rows

    assert (ours(rule) - theirs(direction)).abs().max() < 2e-6
