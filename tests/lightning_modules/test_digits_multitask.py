"""The built-in default model: its losses by the formula, that it learns, resumes and binds to its config."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

import kexue
from kexue.cli.config import compose_run, plain, validate
from kexue.cli.targets import build
from kexue.errors import InputError
from kexue.lightning_modules.imaging.digits_multitask import DigitsMultitaskModule, digits_losses, split_scores
from kexue.nn.losses import ExactLoss, smoothed_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")

SIZES = {"channels": 8, "num_blocks": 1}


def rows(start: int, stop: int) -> list[dict[str, torch.Tensor]]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[start:stop]
    labels = torch.tensor(digits.target)[start:stop]
    return [
        {"image": image[None] / 16, "digit": label, "parity": label % 2, "pixel_sum": image.sum()}
        for image, label in zip(images, labels, strict=True)
    ]


def batch(start: int = 0, stop: int = 64) -> dict[str, torch.Tensor]:
    return next(iter(DataLoader(rows(start, stop), batch_size=stop - start)))


def built(**kwargs) -> DigitsMultitaskModule:
    torch.manual_seed(0)
    module = DigitsMultitaskModule(**SIZES | kwargs)
    module.configure_model()
    return module


def test_losses_by_the_formula() -> None:
    module = built(task_weights={"digit": 2.0, "parity": 0.5, "pixel_sum": 1e-3})
    data = batch()
    with torch.no_grad():
        features = module.features(data["image"])
        losses = module.task_losses(features, data)
        scores = module.head(features)
        digit = -torch.log(scores[:, :10].exp() / scores[:, :10].exp().sum(1, keepdim=True))
        parity = -torch.log(scores[:, 10:12].exp() / scores[:, 10:12].exp().sum(1, keepdim=True))
        each = torch.arange(64)
        assert losses["digit"] == pytest.approx(digit[each, data["digit"]].mean().item(), rel=1e-5)
        assert losses["parity"] == pytest.approx(parity[each, data["parity"]].mean().item(), rel=1e-5)
        squared = (1024 * scores[:, 12] - data["image"].sum((1, 2, 3)) * 16).square().mean()
        assert losses["pixel_sum"] == pytest.approx(squared.item(), rel=1e-5)
        step = module.training_step(data, 0)
        assert step["loss"] == pytest.approx(2 * losses["digit"] + losses["parity"] / 2 + losses["pixel_sum"] / 1000)
        assert step["losses"] == losses
    assert losses["pixel_sum"] > 1e4 * losses["digit"]  # scaled badly, on purpose


def test_head_may_have_more_axes() -> None:
    """A technique may put an axis of samples in front."""
    predicted = split_scores(torch.zeros(3, 5, 13))
    assert [tuple(predicted[key].shape) for key in ("digit", "parity", "pixel_sum")] == [(3, 5, 10), (3, 5, 2), (3, 5)]


def test_result_of_an_image_does_not_depend_on_its_batch() -> None:
    module, data = built(), batch(0, 8)
    module.train()
    with torch.no_grad():
        together = module.features(data["image"])
        alone = torch.cat([module.features(image[None]) for image in data["image"]])
    assert torch.allclose(together, alone, atol=1e-6)


def test_blocks_and_configure_twice() -> None:
    module = built(num_blocks=2)
    net = module.net
    module.configure_model()
    assert module.net is net
    assert len(list(module.blocks())) == 4
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in net.parameters())


def test_learns_one_batch() -> None:
    module, data = built(channels=16), batch()
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for _ in range(80):
        loss = module.weighted(module.task_losses(module.features(data["image"]), data))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses = module.task_losses(module.features(data["image"]), data)
    limits = {"digit": 0.1, "parity": 0.1, "pixel_sum": 4000}
    assert all(losses[task] < limit for task, limit in limits.items()), losses


def fit(folder: Path, epochs: int, resume: Path | None = None) -> tuple[pl.Trainer, DigitsMultitaskModule]:
    pl.seed_everything(1, verbose=False)
    data = DataLoader(rows(0, 96), batch_size=32)
    module = DigitsMultitaskModule(**SIZES, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=folder, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data, DataLoader(rows(96, 128), batch_size=32), ckpt_path=resume, weights_only=True)
    return trainer, module


def test_two_and_two_epochs_are_four(tmp_path: Path) -> None:
    _, whole = fit(tmp_path, 4)
    half, _ = fit(tmp_path, 2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer, resumed = fit(tmp_path, 4, tmp_path / "half.ckpt")
    assert trainer.global_step == 12
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert {"val/loss", "val/digit_accuracy", "val/parity_accuracy", "val/pixel_sum_mae"} <= set(
        trainer.callback_metrics
    )


def test_loads_from_a_checkpoint_alone(tmp_path: Path) -> None:
    trainer, module = fit(tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = DigitsMultitaskModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    data = batch(0, 4)
    assert torch.equal(loaded(data["image"])["digit"], module(data["image"])["digit"])


@pytest.mark.parametrize("loss", ["label_smoothing", "exact"])
def test_the_digit_task_takes_a_loss_by_config(loss: str) -> None:
    """It trains on that, and is validated with cross-entropy; its state and saved values stay as they are."""
    config = plain(compose_run([f"loss={loss}", "model.channels=8"]), "run")
    validate(config)
    torch.manual_seed(0)
    module = build(config["model"], "model")
    module.configure_model()
    other, data = built(num_blocks=2), batch()
    other.load_state_dict(module.state_dict())
    assert other.hparams.keys() == module.hparams.keys()
    scores = split_scores(module.head(module.features(data["image"])))["digit"]
    found = module.task_losses(module.features(data["image"]), data)
    by_hand = {"label_smoothing": smoothed_cross_entropy, "exact": ExactLoss()}[loss]
    expected = by_hand(scores, data["digit"])
    assert found["digit"].item() == pytest.approx(expected.item(), rel=1e-6)
    plain_losses = other.task_losses(other.features(data["image"]), data)
    assert found["digit"] != plain_losses["digit"]
    assert found["parity"] == plain_losses["parity"]
    with torch.no_grad():
        stages = [digits_losses(m(data["image"]), data)["digit"] for m in (module, other)]
    assert stages[0] == stages[1]
    module.training_step(data, 0)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_config_binds() -> None:
    path = Path(kexue.__file__).parent / "conf" / "model" / "digits_multitask.yaml"
    config = yaml.safe_load(path.read_text())
    assert config.pop("_target_") == f"{DigitsMultitaskModule.__module__}.DigitsMultitaskModule"
    assert config.keys() <= inspect.signature(DigitsMultitaskModule).parameters.keys()
    module = DigitsMultitaskModule(**{key: value for key, value in config.items() if key != "optimizer"})
    module.configure_model()
    assert module.training_step(batch(), 0)["loss"].isfinite()


@pytest.mark.parametrize("wrong", [{"channels": 12}, {"task_weights": {"digit": 1.0}}])
def test_wrong_arguments(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        DigitsMultitaskModule(**wrong)
