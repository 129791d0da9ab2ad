"""The cells of the matrix technique x base: small modules, one way to train them, and what a run leaves behind."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import DeepSpeedPrecision, MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from kexue.nn.transformer import EncoderDecoder, Transformer, TransformerConfig
from kexue.strategies import DDP, EMA, ActivationCheckpointing, Lookahead, SingleDevice, Zero

TECHNIQUES = {
    "none": lambda blocks: [],
    "activation_checkpointing": lambda blocks: [ActivationCheckpointing(blocks=blocks)],
    "lookahead": lambda blocks: [Lookahead(k=2, alpha=0.5)],
    "ema": lambda blocks: [EMA(decay=0.6)],
    "both": lambda blocks: [ActivationCheckpointing(blocks=blocks), Lookahead(k=2, alpha=0.5)],
}
BASES = ("ddp", "zero_1", "zero_2", "zero_3")

# Read once: Lightning deletes WORLD_SIZE when a run ends, and these processes train many cells in turn.
# The same tests run on GPUs: see tests/gpu.
ACCELERATOR = os.environ.get("KEXUE_TEST_ACCELERATOR", "cpu")
WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


class Rows(Dataset):
    """Fixed random rows: token ids and a class."""

    def __init__(self, count: int, length: int = 6, vocab: int = 50, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, vocab, (count, length), generator=generator)
        self.labels = torch.randint(0, classes, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"ids": self.ids[index], "labels": self.labels[index]}


class Classifier(pl.LightningModule):
    """What the modules below share. Written as anyone would: it knows nothing of kexue."""

    rows: type[Rows] = Rows

    def __init__(self, optimizer: str = "adamw", lr: float = 0.05, scheduler: bool = False) -> None:
        super().__init__()
        self.optimizer, self.lr, self.scheduler = optimizer, lr, scheduler
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, list):  # several loaders
            batch = {key: torch.cat([part[key] for part in batch]) for key in batch[0]}
        loss = nn.functional.cross_entropy(self(batch["ids"]).float(), batch["labels"])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self(batch["ids"]).float(), batch["labels"]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["ids"]).argmax(-1)

    def configure_optimizers(self) -> Any:
        if self.optimizer in ("sgd", "momentum"):
            momentum = 0.5 if self.optimizer == "momentum" else 0.0
            optimizer: torch.optim.Optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=momentum)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr / 10)
        if not self.scheduler:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Block(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.inner(self.norm(hidden))


class PlainModule(Classifier):
    """Blocks with weights of their own; offers `blocks()`."""

    block_names: Any = None

    def __init__(self, dropout: float = 0.0, shared: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dim = 16
        self.embed = nn.Embedding(50, dim)
        self.layers = nn.ModuleList([Block(dim, dropout) for _ in range(1 if shared else 3)])
        self.repeats = 3 if shared else 1
        self.out = nn.Linear(dim, 3)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for _ in range(self.repeats):
            for layer in self.layers:
                hidden = layer(hidden)
        return self.out(hidden.mean(1))


class SharedModule(PlainModule):
    """One block used three times, as in ALBERT."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(shared=True, **kwargs)


class BertModule(Classifier):
    """A LightningModule around a model of `transformers`, with no method for kexue at all."""

    block_names = "BertLayer"

    def __init__(self, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=3,
        )
        self.bert = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


class ManualModule(PlainModule):
    """Manual optimisation: its own accumulation of two batches and its own clipping-free step."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / 2)
        if batch_idx % 2 == 1:
            optimizer = self.optimizers()
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]


class SpikyModule(PlainModule):
    """Two groups of parameters, and a batch on the last process at which gradients overflow in float16."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 1e6 if batch_idx == 4 and RANK == WORLD - 1 else loss

    def configure_optimizers(self) -> Any:
        (first, *rest) = self.parameters()
        return torch.optim.SGD([{"params": rest, "lr": self.lr / 2}, {"params": [first]}], lr=self.lr)


class TransformerModule(Classifier):
    """A kexue Transformer of any kind with its token scores, built where strategies expect it."""

    block_names: Any = None

    def __init__(self, config: dict[str, Any], dropout: float = 0.0, seed_by_rank: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = 5 + RANK * seed_by_rank
        sizes = {"vocab_size": 50, "dim": 16, "num_layers": 2, "num_heads": 2, "feedforward_dim": 32, "max_length": 8}
        self.config = TransformerConfig(**(sizes | {"dropout": dropout, "heads": ("lm",)} | config))

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            # Seeded here: under ZeRO stage 3 the engine has drawn other numbers before.
            torch.manual_seed(self.seed)
            kind = EncoderDecoder if self.config.num_decoder_layers else Transformer
            self.net = kind(self.config)

    def blocks(self) -> Any:
        return self.net.blocks()

    def forward(self, ids: Tensor) -> Tensor:
        if isinstance(self.net, EncoderDecoder):
            return self.net.logits(self.net(ids, ids))
        return self.net.logits(self.net(ids))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch["ids"])[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())
        self.losses.append(loss.item())
        return loss


MODULES = {
    "plain": PlainModule,
    "shared": SharedModule,
    "bert": BertModule,
    "manual": ManualModule,
    "spiky": SpikyModule,
    "transformer": TransformerModule,
}


def make_strategy(base: str, techniques: list[Any], **kwargs: Any) -> Any:
    if base == "single":
        return SingleDevice(techniques)
    if base == "ddp":
        return DDP(techniques, process_group_backend="gloo" if ACCELERATOR == "cpu" else "nccl", **kwargs)
    return Zero(stage=int(base[5]), techniques=techniques, **kwargs)


def loader(
    rank: int,
    world: int,
    rows: int | Dataset,
    batch: int,
    shuffle: bool | str = False,
    **kwargs: Any,
) -> DataLoader:
    """Batches such that the union over ranks is the batch that one process would see."""
    data = Rows(rows) if isinstance(rows, int) else rows
    if shuffle == "random":
        return DataLoader(data, batch_size=batch // world, shuffle=True, **kwargs)
    sampler = DistributedSampler(data, num_replicas=world, rank=rank, shuffle=bool(shuffle))
    return DataLoader(data, batch_size=batch // world, sampler=sampler, **kwargs)


def train(
    base: str,
    techniques: str = "none",
    module: str | type[Classifier] = "plain",
    *,
    epochs: int = 2,
    rows: int = 24,
    batch: int = 4,
    accumulate: int = 1,
    clip: float | None = None,
    precision: Any = "32-true",
    resume: str | None = None,
    save: str | None = None,
    save_at_step: int | None = None,
    max_steps: int = -1,
    shuffle: bool | str = False,
    strategy: dict[str, Any] | None = None,
    loader_options: dict[str, Any] | None = None,
    loaders: int = 1,
    stock: Any = None,
    folder: str | None = None,
    **module_options: Any,
) -> dict[str, Any]:
    """Train one cell and return its losses (mean over ranks), its final weights, and what else there is to compare."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pl.seed_everything(11, verbose=False)
        model = (MODULES[module] if isinstance(module, str) else module)(**module_options)
        chosen = stock or make_strategy(base, TECHNIQUES[techniques](model.block_names), **(strategy or {}))
        world, rank = WORLD, RANK
        callbacks: list[pl.Callback] = [] if save_at_step is None else [_SaveAt(save_at_step, str(save))]
        trainer = pl.Trainer(
            accelerator=ACCELERATOR,
            devices=world,
            strategy=chosen,
            max_epochs=epochs,
            max_steps=max_steps,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            **_precision(base, precision),
            callbacks=callbacks,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
        # Ranks draw different dropout masks, as they would in a real run.
        torch.manual_seed(100 + rank)
        data = [loader(rank, world, model.rows(rows), batch, shuffle, **(loader_options or {})) for _ in range(loaders)]
        trainer.fit(model, data[0] if loaders == 1 else data, ckpt_path=resume)
        if save is not None and save_at_step is None:
            trainer.save_checkpoint(save)
    result = {"losses": _mean_over_ranks(model.losses, world), "step": trainer.global_step}
    result["weights"] = full_weights(model)
    result["buffers"] = {name: buffer.clone().numpy(force=True) for name, buffer in model.named_buffers()}
    result["scale"] = _scale_of(trainer)
    result["bucket"] = getattr(chosen, "config", {}).get("zero_optimization", {}).get("reduce_bucket_size")
    result["drift"] = _drift(result["weights"], world)
    result["state"] = technique_state(getattr(chosen, "techniques", ()))
    result["warnings"] = list(dict.fromkeys(str(warning.message) for warning in caught))
    return result


def _precision(base: str, precision: Any) -> dict[str, Any]:
    """Arguments of a Trainer; on a CPU Lightning turns 16-mixed into bf16-mixed, unless it is given as a plugin."""
    if precision != "16-mixed" or ACCELERATOR != "cpu":
        return {"precision": precision}
    if base.startswith("zero"):
        return {"plugins": [DeepSpeedPrecision("16-mixed")]}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}


def technique_state(techniques: Sequence[Any]) -> list[Any]:
    """Return what techniques keep of their own, and the state of the optimisers they have wrapped; tensors as bytes."""
    optimizers = [optimizer for technique in techniques for optimizer in getattr(technique, "_optimizers", ())]
    entries = [entry for optimizer in optimizers for entry in optimizer.state.values()]
    return _as_bytes([*entries, *(technique.state_dict() for technique in techniques)])


def _as_bytes(value: Any) -> Any:
    """Return nested data that compares equal only if every bit is, also where there are NaNs."""
    if isinstance(value, dict):
        return {key: _as_bytes(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_bytes(entry) for entry in value]
    return value.numpy(force=True).tobytes() if isinstance(value, Tensor) else value


def _scale_of(trainer: pl.Trainer) -> float | None:
    """The scale of the loss at 16-mixed."""
    for owner, name in ((trainer.strategy, "loss_scale"), (trainer.precision_plugin, "scaler")):
        if getattr(owner, name, None) is not None:
            return float(getattr(owner, name).state_dict()["scale"])
    return None


def full_weights(model: pl.LightningModule) -> dict[str, Any]:
    """Return the weights as arrays, gathered where ZeRO-3 has divided them."""
    parameters = list(model.named_parameters())
    if parameters and hasattr(parameters[0][1], "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for _, p in parameters]):
            return {name: p.detach().float().clone().numpy(force=True) for name, p in parameters}
    return {name: p.detach().float().clone().numpy(force=True) for name, p in parameters}


def _mean_over_ranks(losses: list[float], world: int) -> list[float]:
    if world == 1:
        return losses
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, losses)
    return [sum(values) / world for values in zip(*gathered, strict=True)]


def _drift(weights: dict[str, Any], world: int) -> float:
    """Return the largest difference of a weight between ranks."""
    if world == 1:
        return 0.0
    highest = torch.cat([torch.from_numpy(value).flatten() for value in weights.values()])
    lowest = highest.clone()
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    return (highest - lowest).max().item()


class _SaveAt(pl.Callback):
    def __init__(self, batches: int, path: str) -> None:
        self.batches, self.path = batches, path
        self.seen = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)


def run_all(cells: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]]) -> dict[Any, Any]:
    """Train many cells in this process, one after another; a cell that fails leaves its error as text."""
    freeze_libraries()
    if ACCELERATOR != "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    results: dict[Any, Any] = {}
    for key, (args, kwargs) in cells.items():
        try:
            results[key] = train(*args, **kwargs)
        except Exception as error:
            results[key] = f"{type(error).__name__}: {error}"
    return results


def freeze_libraries() -> None:
    """DeepSpeed collects garbage for every engine that it makes: keep it from looking through the libraries again."""
    import deepspeed  # noqa: F401

    gc.collect()
    gc.freeze()


def differences(run: Any, reference: Any) -> tuple[float, float]:
    """Return the largest difference of the losses both runs have (from the end) and of the final weights."""
    assert not isinstance(run, str), run
    assert not isinstance(reference, str), reference
    losses = [abs(a - b) for a, b in zip(run["losses"][::-1], reference["losses"][::-1], strict=False)]
    weights = [abs(run["weights"][name] - weight).max() for name, weight in reference["weights"].items()]
    return float(np.max(losses)), float(np.max(weights))  # numpy's: not-a-numbers are not passed over
