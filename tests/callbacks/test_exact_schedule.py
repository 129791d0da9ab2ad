"""The schedule of the noise, and steps of even length, without a trainer, in short runs and on every base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import BASES, MODULES, RANK, WORLD, Classifier, differences, full_weights, loader, make_strategy
from ranks import run_ranks
from torch import Tensor

from kexue.callbacks import ExactSchedule, GradientNormaliser, exact_schedule
from kexue.errors import InputError
from kexue.nn.losses import ExactLoss


def test_schedule_by_the_formula() -> None:
    options = {"start": 10.0, "end": 0.1, "after": 0.2, "until": 0.6}
    assert exact_schedule(0.1, **options) == (10.0, 1.0)
    assert exact_schedule(0.2, **options) == (10.0, 0.0)
    assert exact_schedule(0.4, **options) == (pytest.approx(1.0), 0.0)
    assert exact_schedule(0.6, **options) == (pytest.approx(0.1), 0.0)
    assert exact_schedule(1.0, **options) == (pytest.approx(0.1), 0.0)


class Exact(MODULES["plain"]):  # type: ignore[misc, name-defined]
    def __init__(self, **options: Any) -> None:
        super().__init__(optimizer="sgd", lr=0.1)
        self.loss = ExactLoss(**options)
        self.seen: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self(batch["ids"]), batch["labels"])
        self.seen.append((self.loss.sigma, self.loss.cross_entropy))
        self.losses.append(loss.item())
        return loss


def trainer_with(*callbacks: pl.Callback, strategy: Any = "auto", **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=strategy,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def test_schedule_in_a_run_and_after_a_resume(tmp_path: Path) -> None:
    model = Exact()
    trainer = trainer_with(ExactSchedule(10.0, 0.1, after=0.25, until=0.75), max_epochs=2)
    trainer.fit(model, loader(0, 1, 16, 4))
    expected = [exact_schedule(step / 8, 10.0, 0.1, 0.25, 0.75) for step in range(8)]
    assert model.seen == expected
    first = trainer_with(ExactSchedule(10.0, 0.1, 0.25, 0.75, num_steps=8), max_epochs=1)
    first.fit(Exact(), loader(0, 1, 16, 4))
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Exact()
    second = trainer_with(ExactSchedule(10.0, 0.1, 0.25, 0.75), max_epochs=2)
    second.fit(resumed, loader(0, 1, 16, 4), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.seen == expected[4:]


def test_what_the_schedule_needs() -> None:
    with pytest.raises(InputError, match="PlainModule has no ExactLoss"):
        trainer_with(ExactSchedule(), max_epochs=1).fit(MODULES["plain"](), loader(0, 1, 8, 4))
    for arguments, message in (({"end": 0.0}, "above 0"), ({"after": 0.9, "until": 0.5}, "after < until")):
        with pytest.raises(InputError, match=message):
            ExactSchedule(**arguments)


def test_half_cross_entropy() -> None:
    torch.manual_seed(0)
    scores, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, -100, 0])
    parts = [ExactLoss(cross_entropy=share)(scores, target) for share in (0.0, 1.0, 0.5)]
    torch.testing.assert_close(parts[1], torch.nn.functional.cross_entropy(scores, target))
    torch.testing.assert_close(parts[2], (parts[0] + parts[1]) / 2)


def test_running_mean() -> None:
    normaliser = GradientNormaliser(momentum=0.9, floor=0.01)
    assert normaliser.divisor == 1
    for norm in (2.0, 1.0, float("inf"), float("nan")):
        normaliser.update(norm)
    assert normaliser.divisor == pytest.approx(1.9)
    other = GradientNormaliser()
    other.load_state_dict(normaliser.state_dict())
    assert other.divisor == normaliser.divisor
    tiny = GradientNormaliser()
    tiny.update(1e-6)
    assert tiny.divisor == 0.01
    for arguments in ({"momentum": 1.0}, {"floor": 0.0}):
        with pytest.raises(InputError, match=r"use a number (from 0 to below 1|above 0)"):
            GradientNormaliser(**arguments)


class Scaled(Classifier):
    """A parameter whose gradient is given."""

    def __init__(self, gradients: list[float]) -> None:
        super().__init__(optimizer="sgd", lr=1.0)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.gradients = gradients

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.gradients[self.global_step] * self.weight.sum()


def test_steps_by_the_formula() -> None:
    model = Scaled([4.0, 2.0, 1e-3])
    trainer_with(GradientNormaliser(), max_steps=3).fit(model, loader(0, 1, 16, 4))
    mean = 0.9 * 4 + 0.1 * 2
    assert model.weight.item() == pytest.approx(-(4 + 2 / 4 + 1e-3 / mean), rel=1e-6)


def fit(base: str, *, save: str | None = None, resume: str | None = None, epochs: int = 2) -> dict[str, Any]:
    warnings.filterwarnings("ignore")
    pl.seed_everything(11, verbose=False)
    model, normaliser = Exact(sigma=2.0), GradientNormaliser()
    # A norm that is never reached: the engine computes it, and nothing is clipped.
    trainer = trainer_with(
        normaliser,
        strategy=make_strategy(base, []),
        max_epochs=epochs,
        gradient_clip_val=1e6,
        accumulate_grad_batches=2,
    )
    trainer.fit(model, loader(RANK, WORLD, 24, 4), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return {"losses": model.losses, "weights": full_weights(model), "divisor": normaliser.divisor}


def fit_all(folder: str) -> dict[str, Any]:
    results = {}
    for base in BASES:
        results[base] = fit(base)
        fit(base, save=f"{folder}/{base}.ckpt", epochs=1)
        results[f"{base} resumed"] = fit(base, resume=f"{folder}/{base}.ckpt")
    try:
        trainer_with(GradientNormaliser(), strategy=make_strategy("zero_2", []), max_epochs=1).fit(
            Exact(), loader(RANK, WORLD, 24, 4)
        )
    except InputError as error:
        results["message"] = str(error)
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(fit_all, 2, str(tmp_path_factory.mktemp("normaliser")))[0]


@pytest.mark.parametrize("base", BASES)
def test_bases_agree_and_resume(base: str, runs: dict[str, Any]) -> None:
    assert max(differences(runs[base], runs["ddp"])) <= 1e-6
    assert runs[base]["divisor"] == pytest.approx(runs["ddp"]["divisor"], rel=1e-5)
    assert runs[base]["divisor"] != 1
    assert differences(runs[f"{base} resumed"], runs[base]) == (0.0, 0.0)


def test_zero_without_a_norm_is_explained(runs: dict[str, Any]) -> None:
    assert "set trainer.gradient_clip_val" in runs["message"]
