"""The contract between strategy and technique: the touch points, their order, and what a user may get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from cells import MODULES, loader
from pytorch_lightning.strategies import StrategyRegistry

from kexue.errors import InputError
from kexue.strategies import DDP, ActivationCheckpointing, Lookahead, SingleDevice, Technique, Zero, auto


class Recorder(Technique):
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def attach(self, module: pl.LightningModule) -> None:
        self.calls.append(f"attach {self.name}")

    def detach(self, module: pl.LightningModule) -> None:
        self.calls.append(f"detach {self.name}")

    def wrap_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self.calls.append(f"wrap {self.name}")
        return optimizer


class Other(Recorder):
    """A second kind, since one kind may be given once only."""


class Halve(Technique):
    def combine(self, outputs: Any, module: pl.LightningModule) -> Any:
        return outputs / 2


def fit(strategy: Any, model: pl.LightningModule | None = None, **kwargs: Any) -> tuple[pl.Trainer, Any]:
    pl.seed_everything(1, verbose=False)
    model = model or MODULES["plain"](optimizer="sgd")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(model, loader(0, 1, 8, 4))
    return trainer, model


def test_touch_points_come_in_order_and_only_for_training() -> None:
    calls: list[str] = []
    strategy = SingleDevice([Recorder("a", calls), Other("b", calls)])
    trainer, model = fit(strategy)
    expected = ["attach a", "attach b", "wrap a", "wrap b", "detach b", "detach a"]
    assert calls == expected
    trainer.test(model, loader(0, 1, 8, 4), verbose=False)
    trainer.predict(model, loader(0, 1, 8, 4))
    assert calls == expected
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(0, 1, 8, 4))
    assert calls == expected * 2


def test_combine_changes_the_loss_that_is_trained_on() -> None:
    class Seen(pl.Callback):
        losses: list[float]

        def __init__(self) -> None:
            self.losses = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            self.losses.append(outputs["loss"].item())

    seen = Seen()
    _, model = fit(SingleDevice([Halve()]), callbacks=[seen])
    assert seen.losses == pytest.approx([loss / 2 for loss in model.losses])
    assert "training_step" not in model.__dict__


def test_recomputation_is_detached_after_a_run() -> None:
    _, model = fit(SingleDevice([ActivationCheckpointing()]))
    assert not any("forward" in block.__dict__ for block in model.blocks())


@pytest.mark.parametrize("wrong", [Lookahead, "lookahead", 5])
def test_something_else_than_an_instance_is_explained(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes instances such as"):
        DDP(techniques=[wrong])


def test_one_kind_twice_is_explained() -> None:
    with pytest.raises(TypeError, match="Lookahead is given 2 times"):
        SingleDevice([Lookahead(), Lookahead(k=6)])


def test_wrong_stages_are_explained() -> None:
    with pytest.raises(ValueError, match="use 1, 2 or 3"):
        Zero(stage=4)
    with pytest.raises(ValueError, match="only stage 3"):
        Zero(stage=2, offload_parameters=True)


def test_one_device_strategy_refuses_two_devices() -> None:
    with pytest.raises(InputError, match="strategy=ddp"):
        pl.Trainer(strategy=SingleDevice(), accelerator="cpu", devices=2, logger=False)


def test_names_work_in_lightnings_registry() -> None:
    names = {"kexue_single", "kexue_ddp", "kexue_zero_1", "kexue_zero_2", "kexue_zero_3", "kexue_zero_3_offload"}
    assert names <= set(StrategyRegistry.available_strategies())
    strategy = StrategyRegistry.get("kexue_zero_2")
    assert isinstance(strategy, Zero)
    assert strategy.stage == 2


@pytest.mark.parametrize(
    ("devices", "nodes", "kind"),
    [(1, 1, SingleDevice), ("1", 1, SingleDevice), (2, 1, DDP), ("0,1", 1, DDP), ([0], 1, SingleDevice), (1, 2, DDP)],
)
def test_auto_chooses_by_the_number_of_devices(devices: Any, nodes: int, kind: type) -> None:
    assert type(auto(devices=devices, num_nodes=nodes)) is kind


def test_deepspeed_sections_can_be_laid_over() -> None:
    strategy = Zero(stage=2, config={"zero_optimization": {"reduce_bucket_size": 5}, "wall_clock_breakdown": True})
    assert isinstance(strategy.config, dict)
    assert strategy.config["zero_optimization"]["reduce_bucket_size"] == 5
    assert strategy.config["zero_optimization"]["stage"] == 2
    assert strategy.config["wall_clock_breakdown"] is True
